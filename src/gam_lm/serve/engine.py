"""What reads the prompts and draws the tokens.

Every prompt is read in pieces that end at multiples of ``piece`` tokens, wherever its start comes from: it is computed the same way, with the same rounding,
whether or not others are served and whether or not its start was in the cache. (A chat's next turn, which goes on from the state of the answer before, is equal up
to rounding.) Prompts take turns piece by piece. Answers that wait for their next token get it in one call of the model, whose rows do not depend on each other but in
rounding; an answer alone is computed as the library computes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from anyio import CapacityLimiter, to_thread
from tokenizers import Tokenizer
from torch import Tensor

from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.inference.context import compact, last_logits, state_bytes
from gam_lm.inference.continuation import Continuation, Sampling, step_together
from gam_lm.inference.prompt_lookup import PromptLookup
from gam_lm.inference.text_stream import text_after
from gam_lm.model import LanguageModel, State
from gam_lm.serve.chat import encode
from gam_lm.serve.metrics import Metrics
from gam_lm.serve.model_thread import ModelThread
from gam_lm.serve.prefix_cache import PrefixCache
from gam_lm.serve.protocol import Request, RequestError
from gam_lm.serve.stopping import StopTexts

MOST_STATES = 64
"""States that a single prompt may leave in the cache."""


class Prompt(NamedTuple):
    """A prompt that was read."""

    ids: list[int]
    logits_V: Tensor
    """Of the token that follows."""
    state: State
    cached: int
    """Tokens whose state was in the cache."""


class Piece(NamedTuple):
    """What a turn adds to an answer."""

    text: str
    """In whole characters; may be empty."""
    finish: str | None
    """None, or why nothing follows: "stop" or "length"."""
    tokens: int
    """Drawn so far."""
    state_bytes: int
    """Of the answer's state."""


@dataclass(eq=False)
class _Asked:
    """An answer that waits for its next tokens."""

    answer: Continuation
    most: int
    done: asyncio.Future[None]
    """When ``tokens`` are there, on the loop that waits for them."""
    tokens: list[int] | None = None
    """None until they are drawn."""


@dataclass(kw_only=True)
class Engine:
    """A model, its tokenizer, and the prompts and answers that are at work.

    Made and used on one event loop; the model runs in a thread of its own.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    piece: int = 64
    """Tokens of a prompt that are read in one call of the model."""
    cache_bytes: int = 0
    """Of the states that are kept for texts that go on from earlier ones; 0 keeps none."""
    cache_every: int = 512
    """Tokens between two states of one prompt in the cache, at least."""
    batch: int = 16
    """Answers whose next tokens are drawn in one call of the model; 1 draws each as it would be alone, to the last bit."""
    draft: int = 0
    """Longest draft of speculative decoding by prompt lookup; 0 draws without."""
    threads: int | None = None
    """Cores that the model may use; None leaves torch's number."""
    metrics: Metrics = field(default_factory=Metrics)
    active: int = 0
    """Prompts and answers whose state is held."""
    _asking: deque[_Asked] = field(default_factory=deque)
    _asked_for: bool = False
    """Whether a drawing is about to be asked for."""
    _tokenizing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(2))

    def __post_init__(self) -> None:
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        self._end = None if end is None else int(end)
        self._thread = ModelThread(self.model.layers, lambda: bool(self._asking), self._step, self.threads)  # type: ignore[arg-type]
        self.cache = PrefixCache[State](self.cache_bytes, state_bytes) if self.cache_bytes else None

    async def apart(self, function: Any, *arguments: Any) -> Any:
        """``function(*arguments)`` in a thread: tokenising, rendering a template and the like."""
        return await to_thread.run_sync(function, *arguments, limiter=self._tokenizing)

    def prompt_ids(self, prompt: str | tuple[int, ...], most: int) -> list[int]:
        """Token ids of a prompt; an empty one starts a new document.

        Raises:
            RequestError: where it has more than ``most`` tokens or than learned positions, ids that are none, or nothing to start from.
        """
        ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self._end is not None:
            ids = [self._end]
        return self.checked(ids, most)

    def checked(self, ids: list[int], most: int) -> list[int]:
        """The ids themselves; RequestError where the model cannot read them."""
        config = self.model.config
        if not ids:
            raise RequestError(f"prompt is empty and the tokenizer has no {END_OF_TEXT} to start from: give a prompt of at least one token", param="prompt")
        if (wrong := max(ids)) >= config.vocab_size or (wrong := min(ids)) < 0:
            raise RequestError(f"prompt holds the id {wrong}: ids are from 0 to {config.vocab_size - 1}", param="prompt")
        if len(ids) > most:
            raise RequestError(f"prompt has {len(ids)} tokens: this server reads at most {most}", param="prompt", code="context_length_exceeded")
        if config.positions == "learned" and len(ids) > config.max_position_embeddings:
            said = f"prompt has {len(ids)} tokens, the model's positions end at {config.max_position_embeddings}: use a shorter prompt"
            raise RequestError(said, param="prompt", code="context_length_exceeded")
        return ids

    async def read(self, ids: list[int]) -> Prompt:
        """Read a prompt, from the longest start that the cache has; others take their turns between two pieces."""
        found = self.cache.find(ids[:-1]) if self.cache is not None else None  # the logits come from reading at least one token
        place, state = (found.tokens, found.state) if found is not None else (0, None)
        kept = self._worth_keeping(len(ids), found.shared if found is not None else 0)
        logits_V = None
        self.active += 1
        try:
            while place < len(ids):
                end = min((place // self.piece + 1) * self.piece, len(ids))
                read = await self._thread.read(partial(self._read_piece, ids[place:end], state))
                (logits_V, state), place = read, end
                if self.cache is not None and place in kept:
                    self.cache.keep(ids[:place], compact(read[1]))
        finally:
            self.active -= 1
            self._report_cache()
        assert logits_V is not None and state is not None  # a prompt has at least one token
        cached = found.tokens if found is not None else 0
        self.metrics.tokens("prompt", len(ids) - cached)
        self.metrics.tokens("cached", cached)
        return Prompt(ids, logits_V, state, cached)

    async def write(self, prompt: Prompt, request: Request, stop: tuple[str, ...], choice: int) -> AsyncGenerator[Piece]:
        """The pieces of one answer to a prompt, the last one with the reason of its end. Close the generator to give its state up."""
        seed = None if request.seed is None else (request.seed + choice + 2**63) % 2**64 - 2**63
        sampling = Sampling(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=seed)
        lookup = None
        if self.draft:
            lookup = PromptLookup()
            await self.apart(lookup.add, prompt.ids)
        answer = Continuation(
            self.model, prompt.logits_V, prompt.state, sampling, stop=frozenset() if self._end is None else frozenset({self._end}),
            lookup=lookup, most_draft=self.draft,
        )  # fmt: skip
        stream, held, drawn = text_after(self.tokenizer, prompt.ids), StopTexts(stop), 0
        size, asked = state_bytes(prompt.state), None
        self.active += 1
        try:
            while drawn < request.max_tokens:
                started = time.perf_counter()
                asked = _Asked(answer, request.max_tokens - drawn, asyncio.get_running_loop().create_future())
                tokens = await self._drawn(asked)
                self.metrics.drawn(len(tokens), time.perf_counter() - started)
                if not tokens:
                    break
                said = ""
                for token in tokens:
                    drawn += 1
                    text, stopped = held.add(stream.step(self.tokenizer, token) or "")
                    said += text
                    if stopped:
                        yield Piece(said, "stop", drawn, size)
                        return
                size = state_bytes(answer.state)
                yield Piece(said, None, drawn, size)
            full = drawn >= request.max_tokens or self._positions_used_up(len(prompt.ids) + drawn)
            yield Piece(held.rest, "length" if full else "stop", drawn, size)
        finally:
            self.active -= 1
            self.metrics.drafts(answer.drafted, answer.agreed)
            # Where the client left while its token was being drawn with those of others, the state is at work.
            if self.cache is not None and answer.read and (asked is None or asked.tokens is not None):
                self.cache.keep(prompt.ids + answer.read, compact(answer.state))
                self._report_cache()

    def _worth_keeping(self, tokens: int, shared: int) -> set[int]:
        """After how many tokens of a prompt its state is kept: at intervals, where another text has branched off, and at the end."""
        last = tokens // self.piece * self.piece
        every = max(self.cache_every, tokens // MOST_STATES) // self.piece * self.piece or self.piece
        return {*range(every, last + 1, every), last, min(shared, tokens) // self.piece * self.piece} - {0}

    @torch.inference_mode()
    def _read_piece(self, ids: Sequence[int], state: State | None) -> tuple[Tensor, State]:
        tokens_1T = torch.tensor([ids], device=self.model.embed_tokens.weight.device)
        logits_1V, state = last_logits(self.model, tokens_1T, state)
        return logits_1V[0], state

    async def _drawn(self, asked: _Asked) -> list[int]:
        """The next tokens of an answer, drawn together with those of all others who wait."""
        self._asking.append(asked)
        if not self._asked_for:  # those who had a token in the same call ask again within the same round of the loop, and come in one call again
            self._asked_for = True
            asyncio.get_running_loop().call_soon(self._ask)
        try:
            await asked.done
        finally:
            with contextlib.suppress(ValueError):  # it left before its turn came
                self._asking.remove(asked)
        assert asked.tokens is not None
        return asked.tokens

    def _ask(self) -> None:
        self._asked_for = False
        self._thread.draw_soon()

    @torch.inference_mode()
    def _step(self) -> None:
        """Draw for those who wait now. They are taken off the list first, so that whoever is given up on the way takes nobody along."""
        waiting: list[_Asked] = []
        with contextlib.suppress(IndexError):
            while len(waiting) < self.batch:
                waiting.append(self._asking.popleft())
        if self._asking:
            self._thread.draw_soon()
        if not waiting:
            return
        failure: Exception | None = None
        try:
            drawn = step_together([(each.answer, each.most) for each in waiting])
            for asked, tokens in zip(waiting, drawn, strict=True):
                asked.tokens = tokens
        except Exception as error:  # raised where each of them waits
            failure = error
        waiting[0].done.get_loop().call_soon_threadsafe(_tell, waiting, failure)

    def _positions_used_up(self, tokens: int) -> bool:
        config = self.model.config
        return config.positions == "learned" and tokens > config.max_position_embeddings

    def _report_cache(self) -> None:
        if self.cache is not None:
            self.metrics.cache(self.cache.nbytes, len(self.cache))


def _tell(waiting: Sequence[_Asked], failure: Exception | None) -> None:
    """Wake those who wait, unless they have left."""
    for asked in waiting:
        if asked.done.done():
            continue
        if failure is None:
            asked.done.set_result(None)
        else:
            error = RuntimeError("a call of the model failed")
            error.__cause__ = failure
            asked.done.set_exception(error)
