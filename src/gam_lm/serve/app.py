"""The routes: /v1/models, /v1/completions, /v1/chat/completions, /health."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gam_lm.errors import InputError
from gam_lm.serve.engine import Engine, Piece
from gam_lm.serve.protocol import Answer, Request, RequestError, read_request

CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is there to read it


def make_app(engine: Engine, *, name: str, most_tokens: int) -> Starlette:
    """The ASGI application that serves ``engine`` under ``name``; ``most_tokens`` bounds the max_tokens of a request."""
    created = int(time.time())
    described = {"id": name, "object": "model", "created": created, "owned_by": "gam-lm"}

    async def models(request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [described]})

    async def model(request: HttpRequest) -> Response:
        if request.path_params["name"] != name:
            raise RequestError(f"model is {request.path_params['name']!r}, this server has {name!r}", param="model", status=404, code="model_not_found")
        return JSONResponse(described)

    async def health(request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "active": engine.active})

    async def completions(request: HttpRequest) -> Response:
        return await _complete(engine, request, name, most_tokens, chat=False)

    async def chat_completions(request: HttpRequest) -> Response:
        return await _complete(engine, request, name, most_tokens, chat=True)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        ],
        exception_handlers={InputError: _refused, HTTPException: _not_found},  # type: ignore[dict-item]
    )


async def _refused(request: HttpRequest, error: InputError) -> Response:
    error = error if isinstance(error, RequestError) else RequestError(str(error), param="prompt")
    return JSONResponse(error.body(), status_code=error.status)


async def _not_found(request: HttpRequest, error: HTTPException) -> Response:
    wrong = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(wrong.body(), status_code=error.status_code, headers=error.headers)


async def _complete(engine: Engine, http: HttpRequest, name: str, most_tokens: int, *, chat: bool) -> Response:
    try:
        body = json.loads(await http.body())
    except ValueError as error:
        raise RequestError(f"the request is no JSON: {error}") from error
    request = read_request(body, model=name, chat=chat, most_tokens=most_tokens)
    stop = request.stop
    prompts = request.prompts
    if chat:
        text, ends = engine.chat_prompt(request.messages)
        prompts, stop = (text,), stop + ends
    answer = Answer(id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", model=name, created=int(time.time()), chat=chat)
    texts = [prompt if isinstance(prompt, str) else engine.tokenizer.decode(list(prompt)) for prompt in prompts] if request.echo else [""] * len(prompts)
    pieces = _pieces(engine, [engine.prompt_ids(prompt) for prompt in prompts], texts, request, stop)
    first = await anext(pieces)  # what is wrong with the prompt is found here, while the status is still open
    if request.stream:
        return StreamingResponse(_events(first, pieces, answer, request), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return await _whole(first, pieces, answer, http)


class _Usage(dict[str, int]):
    """Token counts, complete when the pieces have ended."""


async def _pieces(
    engine: Engine, prompts: list[list[int]], echoes: list[str], request: Request, stop: tuple[str, ...]
) -> AsyncGenerator[tuple[int, Piece, _Usage]]:
    """All pieces of all choices, one choice after the other."""
    usage = _Usage(prompt_tokens=sum(map(len, prompts)), completion_tokens=0, total_tokens=0)
    for index in range(len(prompts) * request.n):
        which, choice = divmod(index, request.n)
        echo, before = echoes[which], usage["completion_tokens"]
        async with engine.sequence(prompts[which], request, stop, choice) as turns:
            async for piece in turns:
                usage["completion_tokens"] = before + piece.tokens
                usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
                yield index, piece._replace(text=echo + piece.text), usage
                echo = ""


async def _events(
    first: tuple[int, Piece, _Usage], pieces: AsyncGenerator[tuple[int, Piece, _Usage]], answer: Answer, request: Request
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    index, piece, usage = first
    try:
        yield _event(answer.piece(index, piece.text, piece.finish))
        async for index, piece, _ in pieces:
            if piece.text or piece.finish:
                yield _event(answer.piece(index, piece.text, piece.finish))
    except InputError as error:  # of a later prompt
        yield _event(RequestError(str(error), param="prompt").body())
    finally:
        await pieces.aclose()
    if request.include_usage:
        yield _event(answer.usage(usage))
    yield "data: [DONE]\n\n"


async def _whole(
    first: tuple[int, Piece, _Usage], pieces: AsyncGenerator[tuple[int, Piece, _Usage]], answer: Answer, http: HttpRequest
) -> Response:
    """The answer at once, unless whoever asked has gone."""
    _, piece, usage = first
    texts, finishes = [piece.text], [piece.finish or ""]
    try:
        async for index, piece, _ in pieces:
            if index == len(texts):
                texts.append("")
                finishes.append("")
            texts[index] += piece.text
            finishes[index] = piece.finish or ""
            if await http.is_disconnected():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await pieces.aclose()
    return JSONResponse(answer.whole(texts, finishes, usage))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
