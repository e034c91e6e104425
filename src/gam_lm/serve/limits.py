"""What one request may ask for, and how many requests are served at a time. Imports no torch."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
from pydantic import Field

from gam_lm.errors import checked
from gam_lm.serve.protocol import RequestError

Count = Annotated[int, Field(ge=1, lt=2**31)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


@checked
class Limits:
    """Bounds of a server that strangers may reach."""

    most_body_bytes: Count = 4 * 2**20
    """Largest body of a request."""
    most_prompt_tokens: Count = 131_072
    """Most tokens in the prompts of a request, together."""
    most_tokens: Count = 4096
    """Most tokens that a request may ask for: max_tokens times the number of answers."""
    most_stops: Count = 4
    """Most stop texts."""
    most_stop_characters: Count = 256
    """Longest stop text."""
    concurrent: Count = 32
    """Requests that are answered at a time."""
    waiting: Annotated[int, Field(ge=0, lt=2**31)] = 128
    """Requests that may wait for their turn; what comes beyond them gets status 429."""
    header_seconds: Seconds = 10.0
    """Time for the headers of a request."""
    body_seconds: Seconds = 30.0
    """Time for the body of a request."""
    write_seconds: Seconds = 30.0
    """Time in which a client must take what it is sent."""


class Admission:
    """Lets so many requests in, keeps some waiting, and turns the rest away."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.admitted = 0
        """Requests inside: read, waiting and answered."""
        self.answering = 0
        """Requests that have their turn."""
        self._turns = anyio.CapacityLimiter(limits.concurrent)
        self._seconds = 1.0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place inside. Raises RequestError with status 429 where all are taken."""
        if self.admitted >= self.limits.concurrent + self.limits.waiting:
            raise RequestError(
                f"{self.admitted} requests are being answered or wait: try again later", status=429, code="rate_limit_exceeded",
                headers={"Retry-After": str(self.retry_after)},
            )  # fmt: skip
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn to be answered, in the order of asking."""
        async with self._turns:
            self.answering += 1
            started = time.monotonic()
            try:
                yield
            finally:
                self.answering -= 1
                self._seconds += 0.1 * (time.monotonic() - started - self._seconds)

    @property
    def retry_after(self) -> int:
        """Seconds until a place should be free, from how long the latest requests took; from 1 to 60."""
        return min(60, max(1, math.ceil(self._seconds * self.admitted / self.limits.concurrent)))
