"""A context as an object: what a model has read, to be kept, forked, rewound, saved and gone on from.

    context = Context(model)
    context.read(ids)                  # any number of tokens, in bounded memory
    other = context.fork()             # costs nothing: states are never changed in place
    context.rewind(20)                 # exact: from the nearest earlier state, reading the rest again
    context.save("book.state");  Context.load("book.state", model)

Shapes: B rows, T tokens, V = vocab_size, D = hidden_size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.model import LanguageModel, State

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 4096
"""Most tokens that go through the model in one call."""


class Earlier(NamedTuple):
    """A state of the ring."""

    tokens: int
    """Read before it."""
    state: State


class Context:
    """The state of a model after the tokens read so far, with a ring of earlier states to go back to.

    A state is never changed in place, so that forks share tensors and reading in one leaves the other as it was. Memory is bounded: ``keep + 1`` states
    and the last ``every * (keep + 1)`` tokens. (The state of attention itself grows with the text.)

    Args:
        model: in evaluation mode.
        batch_size: rows, which read the same number of tokens in every call.
        every: tokens between two states of the ring.
        keep: states in the ring; `rewind` reaches at least ``every * (keep - 1) - 1`` tokens back, or to the start.

    Raises:
        InputError: for a number below 1.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int = 1, every: int = 256, keep: int = 8) -> None:
        for name, value in (("batch_size", batch_size), ("every", every), ("keep", keep)):
            if value < 1:
                raise InputError(f"{name} is {value}: use a whole number of at least 1")
        self.model, self.every, self.keep = model, every, keep
        self.state = model.initial_state(batch_size)
        self.logits: Tensor | None = None
        """Of the next token (B, V); None before the first token."""
        self.count = 0
        """Tokens that every row has read since the context was made."""
        self.tail = torch.zeros(batch_size, 0, dtype=torch.long, device=self.state.position_B.device)
        """The last tokens read (B, ≤ every * (keep + 1)), which `rewind` reads again."""
        self.ring = deque([Earlier(0, self.state)], maxlen=keep)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.state.position_B)

    @property
    def nbytes(self) -> int:
        """Bytes of the state, the ring left aside."""
        return state_bytes(self.state)

    @property
    def furthest(self) -> int:
        """Most tokens that `rewind` can take back."""
        return max([0, *(self.count - earlier.tokens - (earlier.tokens > 0) for earlier in self._reachable)])

    @property
    def _reachable(self) -> list[Earlier]:
        """The states of the ring from which the tokens read since are known."""
        return [earlier for earlier in self.ring if self.count - earlier.tokens <= self.tail.shape[1]]

    def read(self, tokens: Tensor | Sequence[int], *, done: Callable[[int], None] = lambda tokens: None) -> Tensor | None:
        """Read more tokens.

        Args:
            tokens: ids (B, T); of one row also (T,) or a list.
            done: called with the number of tokens of every piece that was read.

        Returns:
            Logits of the token that follows (B, V); None where nothing was ever read.

        Raises:
            InputError: for ids that the model does not know, a wrong number of rows, or a text that learned positions cannot hold.
        """
        tokens_BT = self._rows(tokens)
        # Of all pieces before the first is read: what is refused leaves the context as it was.
        self.model.check_ids(tokens_BT)
        if self.model.config.longest is not None:
            self.model.config.check_length("the text's length", int(self.state.position_B.max()) + tokens_BT.shape[1])
        for piece_BT in self._pieces(tokens_BT):
            logits, state = last_logits(self.model, piece_BT, self.state)
            self.logits, self.state, self.count = logits, state, self.count + piece_BT.shape[1]
            self.tail = torch.cat([self.tail, piece_BT], 1)[:, -self.every * (self.keep + 1) :].clone()
            if self.count % self.every == 0:
                self.ring.append(Earlier(self.count, compact(state)))
            done(piece_BT.shape[1])
        return self.logits

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens, as if they had never been read. Raises InputError where they reach beyond `furthest`."""
        if tokens < 0 or tokens > self.furthest:
            raise InputError(f"tokens is {tokens}: this context can be rewound by 0 to {self.furthest} tokens, make it with a larger keep to go further")
        if tokens == 0:
            return
        target = self.count - tokens
        # At least one token is read again, because the logits are not kept in the ring.
        usable = (earlier for earlier in self._reachable if earlier.tokens < target or earlier.tokens == target == 0)
        start = max(usable, key=lambda earlier: earlier.tokens)
        self.ring = deque((earlier for earlier in self.ring if earlier.tokens <= target), maxlen=self.keep)
        again_BT = self.tail[:, self.tail.shape[1] - (self.count - start.tokens) : self.tail.shape[1] - tokens]
        self.tail, self.state, self.count, self.logits = self.tail[:, : self.tail.shape[1] - tokens].clone(), start.state, target, None
        for piece_BT in again_BT.split(PIECE, 1) if target else ():
            self.logits, self.state = last_logits(self.model, piece_BT, self.state)

    def fork(self) -> Context:
        """Another context of the same past, which goes its own way."""
        return self._like(self.state, self.logits, self.tail, self.ring)

    def to(self, device: torch.device | str, model: LanguageModel | None = None) -> Context:
        """The context on another device, with the ``model`` that lies there (by default this one, which must have been moved)."""

        def moved(state: State) -> State:
            return map_state(lambda x: x.to(device), state)

        ring = [Earlier(earlier.tokens, moved(earlier.state)) for earlier in self.ring]
        logits = None if self.logits is None else self.logits.to(device)
        context = self._like(moved(self.state), logits, self.tail.to(device), ring)
        context.model = model or self.model
        return context

    @classmethod
    def batch(cls, contexts: Sequence[Context]) -> Context:
        """Several contexts of one model as the rows of one. Of the rings, states equally many tokens ago in all remain.

        Raises:
            InputError: for none, contexts of different models, some read and some not, or states of different sizes (attention after unequally many tokens).
        """
        if not contexts:
            raise InputError("contexts is empty: give at least one")
        first = contexts[0]
        if any(other.model is not first.model for other in contexts):
            raise InputError("contexts are of different models: batch those of one model")
        if len({other.logits is None for other in contexts}) > 1:
            raise InputError("some contexts have read nothing: batch contexts that have all read something, or none of them")
        ago = set.intersection(*({other.count - earlier.tokens for earlier in other.ring} for other in contexts))
        count = max(other.count for other in contexts)
        ring = []
        for distance in sorted(ago, reverse=True):
            states = [next(e.state for e in other.ring if other.count - e.tokens == distance) for other in contexts]
            ring.append(Earlier(count - distance, join_states(states)))
        kept = min(other.tail.shape[1] for other in contexts)
        tail = torch.cat([other.tail[:, other.tail.shape[1] - kept :] for other in contexts])
        logits = None if first.logits is None else torch.cat([other.logits for other in contexts if other.logits is not None])
        context = first._like(join_states([other.state for other in contexts]), logits, tail, ring)
        context.count = count
        return context

    def split(self) -> list[Context]:
        """A context for each row."""

        def row(i: int) -> Context:
            ring = [Earlier(earlier.tokens, row_of(earlier.state, i)) for earlier in self.ring]
            return self._like(row_of(self.state, i), None if self.logits is None else self.logits[i : i + 1], self.tail[i : i + 1], ring)

        return [row(i) for i in range(self.batch_size)]

    def save(self, path: Path | str, tokenizer: Tokenizer | None = None) -> None:
        """Write the context with the checksums of its model and tokenizer; see `gam_lm.inference.context_file.save_context`."""
        from gam_lm.inference.context_file import save_context

        save_context(self, Path(path), tokenizer)

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel, tokenizer: Tokenizer | None = None) -> Context:
        """Read a context of this model; see `gam_lm.inference.context_file.load_context`."""
        from gam_lm.inference.context_file import load_context

        return load_context(Path(path), model, tokenizer)

    def _like(self, state: State, logits: Tensor | None, tail: Tensor, ring: Sequence[Earlier]) -> Context:
        other = object.__new__(Context)
        other.model, other.every, other.keep, other.count = self.model, self.every, self.keep, self.count
        other.state, other.logits, other.tail, other.ring = state, logits, tail, deque(ring, maxlen=self.keep)
        return other

    def _rows(self, tokens: Tensor | Sequence[int]) -> Tensor:
        found = torch.as_tensor(tokens, dtype=torch.long, device=self.tail.device)
        found = found[None] if found.ndim == 1 else found
        if found.ndim != 2 or len(found) != self.batch_size:
            raise InputError(f"tokens have the shape {tuple(found.shape)}: this context has {self.batch_size} rows, give ids of the shape ({self.batch_size}, T)")
        return found

    def _pieces(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """Pieces that end where the ring wants a state."""
        start = 0
        while start < tokens_BT.shape[1]:
            piece = tokens_BT[:, start : start + min(PIECE, self.every - self.count % self.every)]
            start += piece.shape[1]
            yield piece


@torch.no_grad()
def last_logits(model: LanguageModel, tokens_BT: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Logits after the last token alone (B, V), and the state after it: a piece of a prompt costs no (T, V) logits."""
    h_BTD, state = model.hidden(tokens_BT, state)
    return model.lm_head(h_BTD[:, -1]), state


def map_state(change: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with every tensor changed."""
    return State(change(state.position_B), tuple(tuple(change(tensor) for tensor in layer) for layer in state.layers))


def state_tensors(state: State) -> list[Tensor]:
    """All tensors of a state: position, then layer by layer."""
    return [state.position_B, *(tensor for layer in state.layers for tensor in layer)]


def state_bytes(state: State) -> int:
    """Bytes of all tensors of a state."""
    return sum(tensor.nbytes for tensor in state_tensors(state))


def compact(state: State) -> State:
    """The state without what its tensors are views of, for keeping."""
    return map_state(lambda x: x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format), state)


def join_states(states: Sequence[State]) -> State:
    """The states of several sequences as the rows of one. Raises InputError where their sizes differ."""
    tensors = [state_tensors(state) for state in states]
    for same in zip(*tensors, strict=True):
        if len({tensor.shape[1:] for tensor in same}) > 1:
            shapes = " and ".join(str(tuple(tensor.shape[1:])) for tensor in same[:2])
            raise InputError(f"states have sizes that differ ({shapes}): states that grow are batched after equally many tokens")
    layers = tuple(
        tuple(torch.cat(tensors) for tensors in zip(*layer, strict=True)) for layer in zip(*(state.layers for state in states), strict=True)
    )
    return State(torch.cat([state.position_B for state in states]), layers)


def row_of(state: State, i: int) -> State:
    """The state of one row; its tensors are views."""
    return map_state(lambda x: x[i : i + 1], state)
