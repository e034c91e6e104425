"""The HTTP server: uvicorn, with a time limit for headers, JSON for what is no HTTP, and a log without floods. Imports no torch."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gam_lm.serve.limits import Limits

ABORT = "gam_lm.abort"
"""Key of the scope: a function that drops the connection at once, also where the client takes nothing."""


def make_server(app: Any, limits: Limits) -> uvicorn.Server:
    """A server for ``app``; call its ``run`` with the listening socket."""

    class Connection(_Connection):
        header_seconds = limits.header_seconds

    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3, timeout_keep_alive=30,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").addFilter(NoFlood())
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises OSError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=512)


class NoFlood(logging.Filter):
    """Lets so many lines through in a time, and says how many it kept back.

    Args:
        lines: let through in each stretch of time.
        seconds: length of a stretch.
    """

    def __init__(self, lines: int = 10, seconds: float = 10.0) -> None:
        super().__init__()
        self.lines, self.seconds = lines, seconds
        self._started, self._seen = -seconds, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        now = time.monotonic()
        if now - self._started >= self.seconds:
            kept_back = max(0, self._seen - self.lines)
            self._started, self._seen = now, 0
            if kept_back:
                record.msg, record.args = f"{record.getMessage()} ({kept_back} earlier lines were left out)", None
        self._seen += 1
        return self._seen <= self.lines


class _Connection(H11Protocol):
    header_seconds: float

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        if self._late is None and self._idle():
            self._wait_for_headers()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self._late is not None and not self._idle():
            self._late.cancel()
            self._late = None
        elif self._late is None and self._idle() and self.conn.trailing_data[0]:
            self._wait_for_headers()  # the start of another request came with the one before
        if self.scope is not None:
            scope: dict[str, Any] = self.scope  # type: ignore[assignment]
            scope[ABORT] = self.transport.abort

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._answer(400, msg)

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._late = self.loop.call_later(self.header_seconds, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self._answer(408, f"The headers did not come within {self.header_seconds:g} s.")

    def _answer(self, status: int, message: str) -> None:
        """An answer to what did not become a request, as far as one can be sent; the connection ends."""
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and self._idle():
            reason = {400: b"Bad Request", 408: b"Request Timeout"}[status]
            for event in (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
