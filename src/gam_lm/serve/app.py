"""The routes: the chat page at /, /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import AsyncExitStack, aclosing
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from gam_lm.errors import InputError
from gam_lm.serve.answers import Answer, Usage, event
from gam_lm.serve.chat import Chat
from gam_lm.serve.engine import Engine, Piece
from gam_lm.serve.guard import Guard, read_body, refusal
from gam_lm.serve.limits import Admission, Limits
from gam_lm.serve.protocol import Request, RequestError, read_request
from gam_lm.serve.streams import CLIENT_CLOSED_REQUEST, EventStream, while_connected

ROUTES = frozenset({"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip

Pieces = AsyncGenerator[tuple[int, Piece]]


def make_app(
    engine: Engine, chat: Chat, *, name: str, limits: Limits | None = None, api_key: str | None = None, hosts: Collection[str] = (), cors: Collection[str] = ()
) -> Starlette:
    """The ASGI application that serves ``engine``.

    Args:
        engine: the model.
        chat: how its chats are written.
        name: the model's, in requests and answers.
        limits: what a request may ask for.
        api_key: that requests must bring.
        hosts: names of this server in the Host header, besides its addresses.
        cors: origins whose pages may ask, "*" being all.
    """
    service = _Service(engine, chat, name, limits or Limits())
    middleware = [Middleware(Guard, api_key=api_key, hosts=hosts)]
    if cors:
        allowed = Middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"])
        middleware.insert(0, allowed)
    page = files("gam_lm.serve").joinpath("chat.html").read_text(encoding="utf-8")

    async def chat_page(http: HttpRequest) -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    return Starlette(
        routes=[
            Route("/", chat_page),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={InputError: service.refused, HTTPException: service.not_found, Exception: service.failed},  # type: ignore[dict-item]
    )


class _Service:
    """What the routes do."""

    def __init__(self, engine: Engine, chat: Chat, name: str, limits: Limits) -> None:
        self.engine, self.chat, self.name, self.limits = engine, chat, name, limits
        self.admission = Admission(limits)
        self.created = int(time.time())

    @property
    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "gam-lm"}

    async def models(self, http: HttpRequest) -> Response:
        """The list of the one model."""
        return JSONResponse({"object": "list", "data": [self._described]})

    async def model(self, http: HttpRequest) -> Response:
        """The one model."""
        if (asked := http.path_params["name"]) != self.name:
            raise RequestError(f"model is {asked[:80]!r}, this server has {self.name!r}", param="model", status=404, code="model_not_found")
        return JSONResponse(self._described)

    async def health(self, http: HttpRequest) -> Response:
        """Whether the server is there, and how busy."""
        admission = self.admission
        return JSONResponse(
            {"status": "ok", "active": self.engine.active, "answering": admission.answering, "waiting": admission.admitted - admission.answering}
        )

    async def metrics(self, http: HttpRequest) -> Response:
        """For Prometheus."""
        admission, metrics = self.admission, self.engine.metrics
        text = metrics.text(answering=admission.answering, waiting=admission.admitted - admission.answering)
        return Response(text, headers={"Content-Type": metrics.content_type})

    async def completions(self, http: HttpRequest) -> Response:
        """Texts that go on."""
        return await self._complete(http, chat=False)

    async def chat_completions(self, http: HttpRequest) -> Response:
        """The next answer of a chat."""
        return await self._complete(http, chat=True)

    async def refused(self, http: HttpRequest, error: InputError) -> Response:
        """What is wrong with a request, as JSON."""
        error = error if isinstance(error, RequestError) else RequestError(str(error), param="prompt")
        self.engine.metrics.request(_route(http), error.status)
        return refusal(error)

    async def not_found(self, http: HttpRequest, error: HTTPException) -> Response:
        """Another path or method."""
        self.engine.metrics.request("other", error.status_code)
        return refusal(RequestError(f"{http.method} {http.url.path[:80]}: {error.detail}", status=error.status_code, headers=error.headers))

    async def failed(self, http: HttpRequest, error: Exception) -> Response:
        """Our bug: the server's log has the traceback."""
        self.engine.metrics.request(_route(http), 500)
        return refusal(RequestError("the server made a mistake; its log says which", status=500))

    async def _complete(self, http: HttpRequest, *, chat: bool) -> Response:
        """Check the request and answer it: the limits, its fields and its tokens are known to be good before an answer begins."""
        started = time.perf_counter()
        async with AsyncExitStack() as held:
            await held.enter_async_context(self.admission.place())
            try:
                body = await read_body(http, most=self.limits.most_body_bytes, seconds=self.limits.body_seconds)
            except ClientDisconnect:
                return self._left(http)
            request = read_request(body, model=self.name, chat=chat, limits=self.limits)
            if chat:
                ids = await self.engine.apart(self.chat.ids, request.messages)
                prompts, stop = [self.engine.checked(ids, self.limits.most_prompt_tokens)], request.stop + self.chat.ends
            else:
                prompts, stop = await self.engine.apart(self._prompt_ids, request), request.stop
            answer = Answer(id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", model=self.name, created=int(time.time()), chat=chat)
            usage = Usage(prompt_tokens=sum(map(len, prompts)))
            pieces = self._pieces(prompts, request, stop, usage, started)
            if request.stream:
                events = self._events(pieces, answer, request, usage)
                return EventStream(events, self.admission, held.pop_all(), self.limits.write_seconds, self._counted(http))
            found = await while_connected(http.receive, lambda: self._whole(pieces, answer, usage))
        if found is None:
            return self._left(http)
        self.engine.metrics.request(_route(http), 200)
        return JSONResponse(found)

    def _left(self, http: HttpRequest) -> Response:
        self.engine.metrics.request(_route(http), CLIENT_CLOSED_REQUEST)
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    def _counted(self, http: HttpRequest) -> Callable[[int], None]:
        route = _route(http)
        return lambda status: self.engine.metrics.request(route, status)

    def _prompt_ids(self, request: Request) -> list[list[int]]:
        left, found = self.limits.most_prompt_tokens, []
        for prompt in request.prompts:
            found.append(self.engine.prompt_ids(prompt, left))
            left -= len(found[-1])
        return found

    async def _pieces(self, prompts: list[list[int]], request: Request, stop: tuple[str, ...], usage: Usage, started: float) -> Pieces:
        """All pieces of all choices, one choice after the other; the choices of one prompt share its reading."""
        for which, ids in enumerate(prompts):
            prompt = await self.engine.read(ids)
            usage.cached_tokens += prompt.cached
            echo = await self.engine.apart(self._echo, request, which, ids)
            for choice in range(request.n):
                before, said = usage.completion_tokens, echo
                async with aclosing(self.engine.write(prompt, request, stop, choice)) as answer:
                    async for piece in answer:
                        if not usage.completion_tokens:
                            self.engine.metrics.first_token(time.perf_counter() - started)
                        usage.completion_tokens, usage.state_bytes = before + piece.tokens, piece.state_bytes
                        yield which * request.n + choice, piece._replace(text=said + piece.text)
                        said = ""

    def _echo(self, request: Request, which: int, ids: list[int]) -> str:
        prompt = request.prompts[which] if request.echo else ""
        return prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(ids)

    async def _events(self, pieces: Pieces, answer: Answer, request: Request, usage: Usage) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        begun = -1
        async with aclosing(pieces):
            async for index, piece in pieces:
                if index > begun and answer.chat:
                    yield event(answer.start(index))
                begun = index
                if piece.text or piece.finish:
                    yield event(answer.piece(index, piece.text, piece.finish))
        if request.include_usage:
            yield event(answer.usage(usage))
        yield event("[DONE]")

    async def _whole(self, pieces: Pieces, answer: Answer, usage: Usage) -> dict[str, Any]:
        """The answer at once."""
        texts: list[str] = []
        finishes: list[str] = []
        async with self.admission.turn(), aclosing(pieces):
            async for index, piece in pieces:
                if index == len(texts):
                    texts.append("")
                    finishes.append("")
                texts[index] += piece.text
                finishes[index] = piece.finish or ""
        return answer.whole(texts, finishes, usage)


def _route(http: HttpRequest) -> str:
    """The route without what a client may make up, so that there are few of them."""
    path = http.url.path
    return path if path in ROUTES else "other"
