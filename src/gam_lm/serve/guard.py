"""What a request must bring before it is looked at: a host we know, the key, JSON. Imports no torch."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gam_lm.serve.protocol import RequestError

OPEN = frozenset({"/", "/health"})
"""Paths that need no key."""

LINGER = 4
"""A body that is too large is still received, and thrown away, up to so many times the limit: a client that sends does not read the answer."""


class Guard:
    """ASGI middleware that turns away what has no business here.

    The Host header must be an IP address, localhost, this machine's name, or one of ``hosts``: a page of a stranger that makes its own name point here
    (DNS rebinding) is refused.

    Args:
        app: what is guarded.
        api_key: that "Authorization: Bearer KEY" must bring; None asks for none.
        hosts: further names of this server; "*" allows any.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: Collection[str]) -> None:
        self.app, self.api_key = app, api_key
        self.hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Guard`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise RequestError(f"host is {host[:80]!r}, which this server is not called: start it with --allow-host, or use its address", status=421)
        if self.api_key is not None and scope["path"] not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                said = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                raise RequestError(said, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST" and (kind := headers.get("content-type", "").partition(";")[0].strip().lower()) != "application/json":
            raise RequestError(f"content-type is {kind[:80]!r}: it must be application/json", status=415)

    def _is_ours(self, host: str) -> bool:
        if "*" in self.hosts:
            return True
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def read_body(request: Request, *, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        RequestError: with status 413 where it has more than ``most`` bytes, 408 where it takes longer than ``seconds``.
    """
    body, received = bytearray(), 0
    announced = request.headers.get("content-length", "")
    too_large = announced.isdecimal() and int(announced[:20]) > most
    try:
        with anyio.fail_after(seconds):
            async for piece in request.stream():
                received += len(piece)
                too_large = too_large or received > most
                if not too_large:
                    body += piece
                elif received > LINGER * most:
                    break
    except TimeoutError:
        if not too_large:
            raise RequestError(f"the request's body did not come within {seconds:g} s", status=408, headers={"Connection": "close"}) from None
    if too_large:
        raise RequestError(f"the request's body has more than {most} bytes: send less", status=413, headers={"Connection": "close"})
    return bytes(body)


def refusal(error: RequestError) -> JSONResponse:
    """The answer to a request that cannot be answered."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
