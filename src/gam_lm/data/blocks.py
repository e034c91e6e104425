"""Blocks of T tokens with the T tokens that follow them.

Shapes: B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gam_lm.errors import InputError

IGNORE = -100
"""A target that is not predicted, as PyTorch's cross-entropy spells it."""

Batch = tuple[np.ndarray[Any, Any], ...]
"""Tokens and targets, each int64 (B, T), and where a row holds several sequences their ids, int64 (B, T); 0 is padding."""


@dataclass(frozen=True)
class Marks:
    """What is known of every token id of a text whose tokens do not all count."""

    counted: np.ndarray[Any, Any]
    """Whether it is to be predicted, bool (N,)."""
    segments: np.ndarray[Any, Any]
    """The sequence that it belongs to, int32 (N,); 0 is padding."""


class TrainingBlocks:
    """The batches of a training run: a pure function of seed and step, so that a resumed run needs nothing but the step.

    Args:
        ids: token ids (N,), usually a memory map.
        context: T.
        batch_size: B.
        seed: of the order, which changes every epoch.
        overlap: whether blocks of T + 1 advance by T, so that every token is predicted, or by T + 1, as in the paper's protocol.
        marks: of the ids, where not all count; a block that has no target is left out.

    Raises:
        InputError: where ``ids`` are shorter than one batch.
    """

    def __init__(
        self, ids: np.ndarray[Any, Any], *, context: int, batch_size: int, seed: int, overlap: bool = True, marks: Marks | None = None
    ) -> None:
        self._ids, self._context, self._batch_size, self._seed = ids, context, batch_size, seed
        self._advance = context if overlap else context + 1
        check_length(ids, context)
        self._marks = marks
        starts = np.arange((len(ids) - context - 1) // self._advance + 1) * self._advance if marks is not None else None
        self._starts = None if marks is None or starts is None else starts[_has_target(marks, starts, context)]
        self.blocks_per_epoch = (len(ids) - context - 1) // self._advance + 1 if self._starts is None else len(self._starts)
        self.steps_per_epoch = self.blocks_per_epoch // batch_size
        if self.steps_per_epoch == 0:
            raise InputError(
                f"batch_size is {batch_size}, the training text has {self.blocks_per_epoch} blocks of {context} tokens: "
                "use a smaller batch, a shorter context or more text"
            )
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step 0, 1, …; an epoch's incomplete last batch is left out."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(self.blocks_per_epoch)
        chosen_B = self._order[place * self._batch_size : (place + 1) * self._batch_size]
        starts_B = chosen_B * self._advance if self._starts is None else self._starts[chosen_B]
        places = starts_B[:, None] + np.arange(self._context + 1)
        window = np.asarray(self._ids[places], dtype=np.int64)
        return _marked(window[:, :-1], window[:, 1:], self._marks, places)


def evaluation_blocks(
    ids: np.ndarray[Any, Any], *, context: int, batch_size: int, overlap: bool = True, marks: Marks | None = None
) -> Iterator[Batch]:
    """Blocks of T + 1 that advance by T: every token but the first is a target exactly once, whatever the batch size.

    The tail is padded with tokens 0 and targets −100. With ``overlap=False``, the paper's protocol: blocks that advance by T + 1, the
    incomplete tail left out. With ``marks`` a block that has no target is left out.

    Raises:
        InputError: where ``ids`` are shorter than one block.
    """
    check_length(ids, context)
    advance = context if overlap else context + 1
    last_start = len(ids) - 1 if overlap else len(ids) - context
    starts = np.arange(0, last_start, advance)
    if marks is not None:
        starts = starts[_has_target(marks, starts, context)]
    for first in range(0, len(starts), batch_size):
        starts_B = starts[first : first + batch_size]
        places = starts_B[:, None] + np.arange(context + 1)
        window = np.asarray(ids[np.minimum(places, len(ids) - 1)], dtype=np.int64)
        beyond = places >= len(ids)
        tokens, targets = np.where(beyond[:, :-1], 0, window[:, :-1]), np.where(beyond[:, 1:], IGNORE, window[:, 1:])
        yield _marked(tokens, targets, marks, np.minimum(places, len(ids) - 1))


def _has_target(marks: Marks, starts: np.ndarray[Any, Any], context: int) -> np.ndarray[Any, Any]:
    """Whether the block at each of ``starts`` has a target."""
    before = np.concatenate([[0], np.cumsum(marks.counted)])  # counted tokens before each place
    last = len(marks.counted)
    found: np.ndarray[Any, Any] = before[np.minimum(starts + context + 1, last)] > before[np.minimum(starts + 1, last)]
    return found


def _marked(tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], marks: Marks | None, places: np.ndarray[Any, Any]) -> Batch:
    if marks is None:
        return tokens, targets
    return tokens, np.where(marks.counted[places[:, 1:]], targets, IGNORE), marks.segments[places[:, :-1]].astype(np.int64)


def document_of_blocks(ids: np.ndarray[Any, Any], end: int, context: int) -> np.ndarray[Any, Any]:
    """The document of each block of `evaluation_blocks`, counted from 0, int64 (blocks,): the one in which most of the block's targets lie.

    Args:
        ids: token ids (N,), each document followed by ``end``, which belongs to the document that it ends.
        end: the id of the end of text.
        context: T.
    """
    ended = np.cumsum(np.asarray(ids) == end)[:-1]  # documents that ended before each target: its document
    block, document = np.arange(len(ended)) // context, ended.astype(np.int64)
    kinds, targets = np.unique(np.stack([block, document]), axis=1, return_counts=True)
    order = np.lexsort((-targets, kinds[0]))
    _, first = np.unique(kinds[0][order], return_index=True)
    found: np.ndarray[Any, Any] = kinds[1][order][first]
    return found


def check_length(ids: np.ndarray[Any, Any], context: int) -> None:
    """Raise InputError where ``ids`` do not fill one block."""
    if len(ids) < context + 1:
        raise InputError(f"the text has {len(ids)} tokens, one block of context {context} needs {context + 1}: use more text or a shorter context")
