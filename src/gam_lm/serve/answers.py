"""Answers as the OpenAI clients read them. Knows nothing of models and imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Usage:
    """The token counts of a request, complete when its pieces have ended."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts' tokens, those whose state was in the cache."""
    completion_tokens: int = 0
    state_bytes: int = 0
    """Of one answer's state, as it ended."""

    def json(self) -> dict[str, Any]:
        """With the names of the protocol; ``state_bytes`` is ours."""
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens, "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "state_bytes": self.state_bytes,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How answers to one request are told: name, kind and time stay the same from piece to piece."""

    id: str
    model: str
    created: int
    chat: bool

    def whole(self, texts: list[str], finishes: list[str], usage: Usage) -> dict[str, Any]:
        """All choices at once."""
        choices = [
            self._choice(i, {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}, finish)
            for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return self._envelope("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage.json()}

    def start(self, index: int) -> dict[str, Any]:
        """The first piece of a choice of a chat, which alone tells the role."""
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """A piece of one choice."""
        content = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._chunk([self._choice(index, content, finish)])

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last piece of a stream that was asked for token counts."""
        return self._chunk([]) | {"usage": usage.json()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _choice(index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, "logprobs": None, "finish_reason": finish} | content


def event(value: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n".encode()
