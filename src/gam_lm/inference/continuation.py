"""How a text goes on from a state: draw, read, draw, with drafts where they are asked for.

A draft is read in one call with the tokens before it. Each of its tokens is drawn as it would have been without a draft, with the same random numbers, and
counts while the draw agrees. What was read beyond that is undone by keeping the state from before, so that the text is the same with and without drafts.

Shapes: T tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.errors import InputError
from gam_lm.inference.context import Context, join_states, row_of, state_tensors
from gam_lm.inference.generation import check_sampling, draw
from gam_lm.inference.prompt_lookup import PromptLookup
from gam_lm.inference.text_stream import TAIL, text_after
from gam_lm.model import LanguageModel, State

MOST_UNREAD = 16
"""Tokens that a state may be behind the text before it catches up without a draft."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; see `gam_lm.inference.generation.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)


class Continuation:
    """A text that is being written, token by token.

    Args:
        model: in evaluation mode.
        logits_V: of the first token to draw.
        state: after all tokens so far, of one row.
        sampling: how to draw.
        stop: ids that end the text; they are not part of it.
        lookup: the text so far, for drafts; None draws without.
        most_draft: longest draft.
    """

    def __init__(
        self, model: LanguageModel, logits_V: Tensor, state: State, sampling: Sampling, *,
        stop: frozenset[int] = frozenset(), lookup: PromptLookup | None = None, most_draft: int = 8,
    ) -> None:  # fmt: skip
        self.model, self.state, self.sampling, self.stop = model, state, sampling, stop
        self.read: list[int] = []
        """The tokens drawn that ``state`` has read."""
        self.ended = False
        """Whether nothing follows: a token of ``stop`` was drawn, or learned positions are used up."""
        self.lookup, self.most_draft = lookup, most_draft
        self.drafted = self.agreed = 0
        """Tokens drafted, and how many of them were right."""
        self._hope = most_draft
        self._unread: list[int] = []
        self._first: Tensor | None = logits_V
        self._device = logits_V.device
        self._position = int(state.position_B[0])
        self._generator = torch.Generator(self._device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @torch.no_grad()
    def step(self, most: int | None = None) -> list[int]:
        """The next tokens, at most ``most`` of them: one, or more where a draft was right. Empty when the text has ended."""
        fed = self._plan(most)
        if fed is None:
            return self._without_reading(most)
        logits_1TV, state = self.model.stream(torch.tensor([fed], device=self._device), self.state)
        return self._receive(fed, logits_1TV[0], state)

    def _plan(self, most: int | None) -> list[int] | None:
        """The tokens to read next, a draft among them; None where nothing is to be read."""
        if self.ended or most == 0 or self._first is not None:
            return None
        room = self._room()
        if room is not None and room < len(self._unread):
            self.ended = True
            return None
        return [*self._unread, *self._draft(most, room)]

    def _without_reading(self, most: int | None) -> list[int]:
        if self.ended or most == 0 or self._first is None:
            return []
        first, self._first = [self._draw(self._first)], None
        return self._take(first, first)

    def _receive(self, fed: list[int], logits_TV: Tensor, state: State) -> list[int]:
        """Draw from what reading ``fed`` gave, as long as the draws agree with the draft."""
        draft = fed[len(self._unread) :]
        drawn: list[int] = []
        for logits_V, guess in zip(logits_TV[len(self._unread) - 1 :], [*draft, None], strict=True):
            drawn.append(self._draw(logits_V))
            if drawn[-1] != guess or guess in self.stop:
                break
        agreed = len(drawn) - 1
        kept = drawn
        if agreed == len(draft):
            self.state, self._unread, kept = state, [], drawn[-1:]
            self.read += fed
        if draft:
            self.drafted, self.agreed = self.drafted + len(draft), self.agreed + agreed
            self._hope = min(self.most_draft, 2 * agreed + 1)
        return self._take(drawn, kept)

    def _draw(self, logits_V: Tensor) -> int:
        how = self.sampling
        return int(draw(logits_V, how.temperature, how.top_k, how.top_p, self._generator))

    def _take(self, drawn: list[int], unread: list[int]) -> list[int]:
        """Count what was drawn, up to a token of ``stop``, and what of it the state has not read."""
        if drawn[-1] in self.stop:
            self.ended, drawn, unread = True, drawn[:-1], unread[:-1]
        self._unread += unread
        if self.lookup is not None:
            self.lookup.add(drawn)
        return drawn

    def _room(self) -> int | None:
        """Tokens that learned positions still hold; None where there are no such positions."""
        config = self.model.config
        return config.max_position_embeddings - self._position - len(self.read) if config.positions == "learned" else None

    def _draft(self, most: int | None, room: int | None) -> list[int]:
        if self.lookup is None or len(self._unread) > MOST_UNREAD:
            return []
        limits = [self._hope, self.most_draft]
        if most is not None:
            limits.append(most - 1)
        if room is not None:
            limits.append(room - len(self._unread))
        return list(self.lookup.draft(min(limits))) if min(limits) > 0 else []


@torch.no_grad()
def step_together(steps: Sequence[tuple[Continuation, int | None]]) -> list[list[int]]:
    """What `Continuation.step` gives for each of several texts of one model, in as few calls of the model as there are.

    Texts that read one token, from states of one size, are the rows of one call. A row's result may differ in rounding from that of a call of its own.
    """
    plans = [continuation._plan(most) for continuation, most in steps]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (continuation, _) in enumerate(steps):
        if plans[i] is not None:
            sizes = tuple(tensor.shape for tensor in state_tensors(continuation.state))
            groups.setdefault((i, sizes) if len(plans[i] or ()) > 1 else (sizes,), []).append(i)
    results = [continuation._without_reading(most) if plan is None else [] for (continuation, most), plan in zip(steps, plans, strict=True)]
    for rows in groups.values():
        members = [steps[i][0] for i in rows]
        fed_BT = torch.tensor([plans[i] for i in rows], device=members[0]._device)
        together = members[0].state if len(rows) == 1 else join_states([member.state for member in members])
        logits_BTV, state = members[0].model.stream(fed_BT, together)
        for row, (i, member) in enumerate(zip(rows, members, strict=True)):
            results[i] = member._receive(plans[i] or [], logits_BTV[row], state if len(rows) == 1 else row_of(state, row))
    return results


def continue_text(
    context: Context, tokenizer: Tokenizer, sampling: Sampling, *, max_new_tokens: int | None = 256, lookup: PromptLookup | None = None
) -> Iterator[str]:
    """Yield the text that follows what ``context`` has read, in whole characters, up to <|endoftext|>; the context itself stays as it is.

    Raises InputError for a context of several rows, or one that has read nothing.
    """
    if context.logits is None or context.batch_size > 1:
        raise InputError(f"the context has {context.batch_size} rows and {context.count} tokens: go on from one row that has read at least one token")
    end = tokenizer.token_to_id(END_OF_TEXT)
    stop = frozenset() if end is None else frozenset({end})
    continuation = Continuation(context.model, context.logits[0], context.state, sampling, stop=stop, lookup=lookup)
    stream, left = text_after(tokenizer, context.tail[0, -TAIL:].tolist()), max_new_tokens
    while tokens := continuation.step(left):
        left = None if left is None else left - len(tokens)
        for token in tokens:
            if text := stream.step(tokenizer, token):
                yield text
