"""Requests as the OpenAI clients send them, checked by pydantic. Knows nothing of models and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gam_lm.errors import InputError

if TYPE_CHECKING:
    from gam_lm.serve.limits import Limits

MOST_CHOICES = 16
MOST_ERROR_CHARACTERS = 80

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}), "logprobs": (None, False, 0),
    "top_logprobs": (None, 0), "suffix": (None, ""), "response_format": (None, {"type": "text"}), "tools": (None, []), "tool_choice": (None, "none"),
    "functions": (None, []), "function_call": (None, "none"), "parallel_tool_calls": (None, True, False), "modalities": (None, ["text"]),
}  # fmt: skip
"""Fields that are understood only where they ask for nothing."""

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that say nothing about the text."""


class RequestError(InputError):
    """A request that cannot be answered, with the HTTP status and the field at fault."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code, self.headers = param, status, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that the clients expect."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Text = str
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"] = "text"
    text: Text


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[_Part], Field(fail_fast=True)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class _Body(BaseModel):
    """What both kinds of completion have. Null is the default of every field."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    best_of: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    suffix: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    modalities: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: Any) -> Any:
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in NEUTRAL[info.field_name]):
            raise ValueError("left out: this server does not have it")
        return value


class _CompletionBody(_Body):
    prompt: Text | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]
    echo: bool | None = None


class _ChatBody(_Body):
    messages: Annotated[list[_Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What both kinds of completion ask for."""

    prompts: tuple[str | tuple[int, ...], ...]
    """Texts or token ids to go on from."""
    messages: tuple[dict[str, Any], ...] = ()
    """The messages of a chat, in place of prompts."""
    max_tokens: int
    """Where to end."""
    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int | None
    """Draw from the k likeliest tokens; no field of OpenAI's, but a common one."""
    n: int
    """Choices for each prompt."""
    stop: tuple[str, ...]
    """Texts that end the answer; they are not part of it."""
    seed: int | None
    """Of the draws; choice i takes seed + i."""
    stream: bool
    """Whether the answer comes piece by piece."""
    include_usage: bool
    """Whether a stream ends with the token counts."""
    echo: bool
    """Whether the answer starts with the prompt."""


def read_request(body: bytes | str, *, model: str, chat: bool, limits: Limits) -> Request:
    """Check the JSON of a request.

    Args:
        body: as it came.
        model: name of the one that is served.
        chat: whether it is a chat completion.
        limits: what it may ask for.

    Raises:
        RequestError: with the field, its value and what it may be.
    """
    kind: type[_ChatBody] | type[_CompletionBody] = _ChatBody if chat else _CompletionBody
    try:
        read = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    except RecursionError:
        raise RequestError("the request is nested too deeply") from None
    if read.model != model:
        raise RequestError(f"model is {_short(read.model)}, this server has {model!r}", param="model", status=404, code="model_not_found")
    most = read.max_tokens
    if isinstance(read, _ChatBody):
        most = read.max_completion_tokens or most
        prompts: tuple[str | tuple[int, ...], ...] = ()
        messages = tuple(message.model_dump() | {"content": _content(message)} for message in read.messages)
    else:
        prompts, messages = _prompts(read.prompt), ()
    answers = max(1, len(prompts)) * (read.n or 1)
    usual = max(1, min(256 if chat else 16, limits.most_tokens // answers))
    default = lambda value, otherwise: otherwise if value is None else value  # noqa: E731 - null is the default of every field
    request = Request(
        prompts=prompts, messages=messages, max_tokens=default(most, usual),
        temperature=default(read.temperature, 1.0), top_p=default(read.top_p, 1.0), top_k=read.top_k, n=default(read.n, 1), stop=_stops(read.stop, limits),
        seed=read.seed, stream=bool(read.stream), include_usage=bool(read.stream_options and read.stream_options.include_usage),
        echo=isinstance(read, _CompletionBody) and bool(read.echo),
    )  # fmt: skip
    if request.max_tokens * answers > limits.most_tokens:
        of = f" for each of {answers} answers" if answers > 1 else ""
        raise RequestError(f"max_tokens is {request.max_tokens}{of}: it must be from 1 to {limits.most_tokens // answers}", param="max_tokens")
    return request


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)


def _content(message: _Message) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)


def _stops(stop: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > limits.most_stops or not all(0 < len(each) <= limits.most_stop_characters for each in stops):
        what = f"a text or up to {limits.most_stops} of them, each of 1 to {limits.most_stop_characters} characters"
        raise RequestError(f"stop is {_short(stop)}: it must be {what}", param="stop")
    return tuple(stops)


WANTED = {
    "int_type": "of type int", "int_from_float": "of type int", "float_type": "of type float", "bool_type": "of type bool", "string_type": "of type str",
    "list_type": "a list", "model_type": "an object", "finite_number": "a finite number", "too_short": "not empty",
    "string_too_short": "not empty", "int_parsing_size": "a smaller whole number",
}  # fmt: skip


def _explained(error: ValidationError) -> RequestError:
    """What is wrong first, as field, value and fix."""
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    if kind == "json_invalid":
        return RequestError(f"the request is no JSON: {first['ctx']['error']}")
    place = first["loc"]
    if not place:
        return RequestError("the request is no JSON object")
    field = str(place[0])
    if kind == "extra_forbidden":
        return RequestError(f"{_short(field)} is no field of this request", param=field[:MOST_ERROR_CHARACTERS])
    if field == "prompt":
        value = first["input"] if kind != "missing" else None
        return RequestError(f"prompt is {_short(value)}: it must be a text, a list of token ids, or a list of at most {MOST_CHOICES} of either", param="prompt")
    if field == "messages" and len(place) > 1:
        return RequestError(f"messages[{place[1]}] is {_short(first['input'])}: it must be an object with role and content, both texts", param=f"messages[{place[1]}]")
    if field == "messages":
        return RequestError("messages must be a list of at least one message", param="messages")
    if kind == "missing":
        return RequestError(f"{field} is missing", param=field)
    return RequestError(f"{field} is {_short(first['input'])}: it must be {_wanted(field, first)}", param=field)


def _wanted(field: str, error: Any) -> str:
    kind = error["type"]
    ranges = {"temperature": "from 0 to 2", "top_p": "above 0, at most 1", "n": f"from 1 to {MOST_CHOICES}", "seed": "from -2^63 to 2^63 - 1"}
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return ranges.get(field, "at least 1" if kind.startswith("greater") else "smaller")
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    return WANTED.get(kind, str(error["msg"]))


def _short(value: object) -> str:
    text = repr(value[:MOST_ERROR_CHARACTERS] if isinstance(value, str | list) else value)
    return text if len(text) <= MOST_ERROR_CHARACTERS else text[: MOST_ERROR_CHARACTERS - 1] + "…"
