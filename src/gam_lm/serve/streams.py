"""Work for a client who may leave: it ends with the client, and a client that takes nothing is left. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gam_lm.errors import InputError
from gam_lm.serve.answers import event
from gam_lm.serve.connections import ABORT
from gam_lm.serve.limits import Admission
from gam_lm.serve.protocol import RequestError

logger = logging.getLogger("uvicorn.error")

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is there to read it


async def while_connected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """What ``work`` returns, or None where the client has gone, upon which it is cancelled."""
    found: T | None = None
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(leave)
        try:
            found = await work()
        except Exception as error:  # raised below, not as a group of one
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return found


class EventStream(Response):
    """Server-sent events.

    Args:
        events: as they are sent; closed at the end, come what may.
        admission: where the turn is taken that lasts as long as the stream.
        held: what is given back at the end, the place among the requests.
        seconds: time in which the client must take each event.
        counted: called with the status at the end.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], admission: Admission, held: AsyncExitStack, seconds: float, counted: Callable[[int], None]
    ) -> None:
        super().__init__(status_code=200, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]  # that of an empty body
        self.events, self.admission, self.held, self.seconds, self.counted = events, admission, held, seconds, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        async with self.held:
            done = False
            try:
                done = bool(await while_connected(receive, lambda: self._sent(send)))
            except TimeoutError:
                abort = scope.get(ABORT)
                if abort is not None:
                    abort()
            finally:
                self.counted(200 if done else CLIENT_CLOSED_REQUEST)

    async def _sent(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.events), self.admission.turn():
            try:
                async for each in self.events:
                    await self._send(send, each)
            except TimeoutError:
                raise
            except InputError as error:
                await self._send(send, event(RequestError(str(error), param="prompt").body()))
            except Exception:
                logger.exception("an answer broke off")
                await self._send(send, event(RequestError("the server made a mistake; its log says which", status=500).body()))
        await self._send(send, b"", more=False)
        return True

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        with anyio.fail_after(self.seconds):
            await send({"type": "http.response.body", "body": body, "more_body": more})
