"""Requests as the OpenAI clients send them, checked field by field, and the answers. Knows nothing of models and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from gam_lm.errors import InputError

IGNORED = frozenset({"user", "metadata", "store", "service_tier"})
"""Fields that say nothing about the text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}), "logprobs": (None, False, 0),
    "top_logprobs": (None, 0), "suffix": (None, ""), "response_format": (None, {"type": "text"}), "tools": (None, []), "tool_choice": (None, "none"),
}  # fmt: skip
"""Fields that are understood only where they ask for nothing."""

MOST_CHOICES, MOST_STOPS = 16, 4


class RequestError(InputError):
    """A request that cannot be answered, with the HTTP status and the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """The JSON that the clients expect."""
        return {"error": {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}}


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


def read_request(body: object, *, model: str, chat: bool, most_tokens: int) -> Request:
    """Check the JSON of a request.

    Args:
        body: parsed JSON.
        model: name of the one that is served.
        chat: whether it is a chat completion.
        most_tokens: largest max_tokens.

    Raises:
        RequestError: with the field, its value and what it may be.
    """
    if not isinstance(body, dict):
        raise RequestError("the request is no JSON object")
    fields = _Fields(body)
    if (asked := fields.take("model", str, None)) != model:
        raise RequestError(
            f"model is {asked!r}, this server has {model!r}", param="model", status=404 if asked else 400, code="model_not_found" if asked else None
        )
    for name, values in NEUTRAL.items():
        if (value := fields.rest.pop(name, None)) not in values:
            fields.refuse(name, value, "left out: this server does not have it")
    options = fields.take("stream_options", dict, None) or {}
    max_tokens = fields.take("max_tokens", int, min(256, most_tokens) if chat else 16)
    if chat:
        max_tokens = fields.take("max_completion_tokens", int, max_tokens)
    request = Request(
        prompts=() if chat else _prompts(fields), messages=_messages(fields) if chat else (), max_tokens=max_tokens,
        temperature=fields.take("temperature", float, 1.0), top_p=fields.take("top_p", float, 1.0), top_k=fields.take("top_k", int, None),
        n=fields.take("n", int, 1), stop=_stops(fields), seed=fields.take("seed", int, None), stream=fields.take("stream", bool, False),
        include_usage=bool(options.get("include_usage")), echo=False if chat else fields.take("echo", bool, False),
    )  # fmt: skip
    for name, value, low, high in (("max_tokens", max_tokens, 1, most_tokens), ("n", request.n, 1, MOST_CHOICES), ("top_k", request.top_k, 1, None),
                                   ("temperature", request.temperature, 0, 2), ("top_p", request.top_p, 0, 1)):  # fmt: skip
        if value is not None and not (low <= value <= (value if high is None else high)):
            fields.refuse(name, value, f"from {low} to {high}" if high is not None else f"at least {low}")
    if request.top_p == 0:
        fields.refuse("top_p", 0, "above 0")
    for name in fields.rest.keys() - IGNORED:
        raise RequestError(f"{name} is no field of this request", param=name)
    return request


class _Fields:
    """The fields that nobody has asked for yet."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.rest = dict(body)

    def take(self, name: str, kind: type, default: Any) -> Any:
        """The value of a field, null being the default; a whole number serves as a float."""
        value = self.rest.pop(name, None)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(name, value, f"of type {kind.__name__}")
        return value

    @staticmethod
    def refuse(name: str, value: object, wanted: str) -> NoReturn:
        """Raise the error for a field."""
        raise RequestError(f"{name} is {value!r:.80}: it must be {wanted}", param=name)


def _prompts(fields: _Fields) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each a text or token ids."""
    prompt = fields.rest.pop("prompt", None)
    each = prompt if isinstance(prompt, list) and prompt and not _are_ids(prompt) else [prompt]
    if not all(isinstance(one, str) or (isinstance(one, list) and one and _are_ids(one)) for one in each):
        fields.refuse("prompt", prompt, "a text, a list of token ids, or a list of either")
    if len(each) > MOST_CHOICES:
        fields.refuse("prompt", f"a list of {len(each)}", f"of {MOST_CHOICES} at most")
    return tuple(one if isinstance(one, str) else tuple(one) for one in each)


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _messages(fields: _Fields) -> tuple[dict[str, Any], ...]:
    """The messages, with content in parts joined to one text."""
    messages = fields.take("messages", list, None)
    if not messages:
        fields.refuse("messages", messages, "a list of at least one message")
    found = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            fields.refuse(f"messages[{i}]", message, "an object with role and content, both texts")
        found.append(message | {"content": content})
    return tuple(found)


def _stops(fields: _Fields) -> tuple[str, ...]:
    stop = fields.rest.pop("stop", None)
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(each, str) and each for each in stops):
        fields.refuse("stop", stop, f"a text or up to {MOST_STOPS} of them, none empty")
    return tuple(stops)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How answers to one request are told: name, kind and time stay the same from piece to piece."""

    id: str
    model: str
    created: int
    chat: bool

    def whole(self, texts: list[str], finishes: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """All choices at once."""
        choices = [self._choice(i, text, finish, "message") for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
        return self._envelope("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage}

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """A piece of one choice."""
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [self._choice(index, text, finish, "delta")])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece of a stream that was asked for token counts."""
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": usage}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, index: int, text: str, finish: str | None, key: str) -> dict[str, Any]:
        content = {key: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, "logprobs": None, "finish_reason": finish} | content
