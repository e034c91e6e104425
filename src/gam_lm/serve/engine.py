"""What draws the tokens: every request has a sequence of its own, and they take turns, a token each.

A turn runs in a thread, one at a time, in the order in which the requests ask: a long answer holds up nobody, and a text depends on its own seed
alone, never on who else is served. A sequence that ends, or that nobody waits for any more, is closed, and its state is gone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from anyio import CapacityLimiter, to_thread
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from gam_lm.checkpoint import read_json
from gam_lm.inference.generation import generate
from gam_lm.model import LanguageModel
from gam_lm.serve.protocol import Request, RequestError

END_OF_TEXT = "<|endoftext|>"


class Piece(NamedTuple):
    """What a turn adds to an answer."""

    text: str
    """In whole characters; may be empty."""
    finish: str | None
    """None, or why nothing follows: "stop" or "length"."""
    tokens: int
    """Drawn so far."""


@dataclass(kw_only=True)
class Engine:
    """A model, its tokenizer, and the sequences that are being written."""

    model: LanguageModel
    tokenizer: Tokenizer
    template: Any = None
    """The compiled chat template, or None for plain lines."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Of the tokenizer's config, for the template."""
    active: int = 0
    """Sequences whose state is held."""
    _turn: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    def prompt_ids(self, prompt: str | tuple[int, ...]) -> list[int]:
        """Token ids of a prompt; an empty one starts a new document."""
        if not isinstance(prompt, str):
            return list(prompt)
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        return self.tokenizer.encode(prompt).ids or ([] if end is None else [end])

    def chat_prompt(self, messages: tuple[dict[str, Any], ...]) -> tuple[str, tuple[str, ...]]:
        """The text of a chat up to where the assistant answers, and what ends that answer.

        With the run's chat template, else as lines "User: …", "Assistant: …".

        Raises:
            RequestError: where the template refuses the messages.
        """
        if self.template is None:
            lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
            return "".join(lines) + "Assistant:", ("\nUser:",)
        from jinja2 import TemplateError

        try:
            return self.template.render(messages=list(messages), add_generation_prompt=True, **self.special_tokens), ()
        except TemplateError as error:
            raise RequestError(f"messages do not fit the chat template: {error}", param="messages") from error

    @asynccontextmanager
    async def sequence(self, ids: list[int], request: Request, stop: tuple[str, ...], choice: int) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces of one choice; the state lives as long as the block.

        Raises:
            InputError: at the first piece, where the prompt is empty, too long or holds ids that are none.
        """
        turns = _turns(self.model, self.tokenizer, ids, request, stop, choice)
        self.active += 1
        try:
            async with aclosing(self._taken(turns)) as pieces:
                yield pieces
        finally:
            turns.close()
            self.active -= 1

    async def _taken(self, turns: Generator[Piece]) -> AsyncGenerator[Piece]:
        while (piece := await to_thread.run_sync(next, turns, None, limiter=self._turn)) is not None:
            yield piece


def _turns(
    model: LanguageModel, tokenizer: Tokenizer, ids: list[int], request: Request, stop: tuple[str, ...], choice: int
) -> Generator[Piece]:
    """A piece for every token, and a last one with the reason of the end."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    seed = None if request.seed is None else (request.seed + choice) % 2**63
    stream, held, drawn = DecodeStream(skip_special_tokens=True), _HeldBack(stop), 0
    tokens = generate(
        model, ids, max_new_tokens=request.max_tokens, temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=seed,
        stop=frozenset() if end is None else frozenset({end}),
    )  # fmt: skip
    try:
        for token in tokens:
            drawn += 1
            text, stopped = held.add(stream.step(tokenizer, token) or "")
            if stopped:
                yield Piece(text, "stop", drawn)
                return
            yield Piece(text, None, drawn)
    finally:
        tokens.close()
    room = request.max_tokens if model.embed_positions is None else min(request.max_tokens, model.config.max_position_embeddings - len(ids) + 1)
    yield Piece(held.rest, "length" if drawn >= room else "stop", drawn)


class _HeldBack:
    """Keeps back the end of a text as long as a stop text may have begun in it."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.rest = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be said now, and whether a stop text has come, before which the answer ends."""
        self.rest += text
        places = [place for stop in self.stops if (place := self.rest.find(stop)) >= 0]
        if places:
            return self.rest[: min(places)], True
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if self.rest.endswith(stop[:n])), default=0)
        said, self.rest = self.rest[: len(self.rest) - begun], self.rest[len(self.rest) - begun :]
        return said, False


def read_chat_template(directory: Path) -> tuple[Any, dict[str, str]]:
    """The template of chat_template.jinja or tokenizer_config.json, or None, and the special tokens.

    Raises:
        RequestError: at rendering, for what the template itself refuses.
        InputError: where the file is broken.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    special = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if source is None:
        return None, special
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from gam_lm.errors import InputError

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source), special
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template of {str(directory)!r} is broken ({error}): mend chat_template.jinja or tokenizer_config.json") from error
