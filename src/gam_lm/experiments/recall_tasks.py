"""The synthetic tasks of `gam recall`: their answers stand in the context and nowhere else.

    mqar          keys bound to values, then the keys again, each at a gap drawn from a power law: what was its value?
                  (multi-query associative recall of Zoology, arXiv 2312.04927)
    zoology       the same as Zoology's published code draws it: no value twice in a sequence, the keys bound first asked at the shorter gaps,
                  and filler of any id, also of a key of the sequence
    forgetting    mqar, but half of the keys are bound twice: the last value counts
    copying       tokens scattered over noise, then as many marks: the tokens in their order (selective copying of Mamba, arXiv 2312.00752)
    induction     a mark somewhere in random text, and again at the end: what followed it the first time? (arXiv 2212.14052)
    parity        zeros and ones: is the number of ones so far odd? Asked at every token.
    permutations  each token swaps two of five things: in which of the 120 orders are they now? Asked at every token. (Tracking the swaps of five
                  things takes a state matrix with negative eigenvalues, arXiv 2411.12537: ``max_write`` above 1.)

Every batch is fresh. Filler never contains a key of the same sequence, so that no answer is ambiguous; zoology's does, as published.

Shapes: B sequences, T tokens, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gam_lm.errors import InputError, unknown_name
from gam_lm.ops.cross_entropy import IGNORE

Sample = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Tokens, targets (IGNORE where nothing is asked) and the gap between each asked token and its answer, each int64 (B, T)."""

FILLERS = ("random", "blank")
"""See `RecallTask.filler`."""

TRACKING = ("parity", "permutations")
"""Tasks that ask at every token for a state that all tokens before it change; they have no pairs, and a gap is the number of those tokens."""

ORDERS = np.array(list(itertools.permutations(range(5))))
"""The 120 orders of five things, in lexicographic order: their ids."""

SWAPS = np.array(list(itertools.combinations(range(5), 2)))
"""The ten pairs of places whose things a token swaps."""


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """Which task, at which size. Raises InputError for sizes that do not fit."""

    task: str = "mqar"
    """mqar, zoology, forgetting, copying, induction, parity or permutations."""
    pairs: int = 8
    """Pairs of key and value (copying: tokens; induction, parity and permutations: 1)."""
    length: int = 64
    """Tokens of a sequence."""
    vocab: int = 512
    """Token ids: the lower half keys, the upper half values."""
    gap_power: float = 0.01
    """Exponent of the power law that the gaps are drawn from: near 0 most are short (Zoology's setting), 1 is uniform."""
    filler: str = "random"
    """What stands between the pairs and the questions of mqar and forgetting: random, ids that look like pairs; or blank, one id that is never a key."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        if self.pairs < 1 or self.vocab < 8 or not 0 < self.gap_power <= 1:
            raise InputError(f"pairs is {self.pairs}, vocab {self.vocab}, gap_power {self.gap_power}: use at least 1, at least 8, and above 0 up to 1")
        if self.filler not in FILLERS:
            raise unknown_name("filler", self.filler, FILLERS)
        bindings = self.pairs + (self.pairs // 2 if self.task == "forgetting" else 0)
        needed = {"copying": 2 * self.pairs, "induction": 4, "parity": 1, "permutations": 1}.get(self.task, 2 * (bindings + self.pairs))
        if self.length < needed:
            raise InputError(f"length is {self.length}: {self.task} with {self.pairs} pairs takes at least {needed} tokens")
        if self.task in ("mqar", "zoology", "forgetting") and self.vocab // 2 <= self.pairs:
            raise InputError(f"vocab is {self.vocab}: {self.pairs} pairs and a filler take more than {2 * self.pairs} token ids")
        if self.task == "permutations" and self.vocab < len(ORDERS):
            raise InputError(f"vocab is {self.vocab}: the orders of five things take {len(ORDERS)} token ids")
        if self.task not in ("mqar", "forgetting") and self.filler != "random":
            raise InputError(f"filler is {self.filler!r} with task {self.task!r}: it belongs to mqar and forgetting")

    def sample(self, batch: int, generator: np.random.Generator) -> Sample:
        """A fresh batch."""
        return TASKS[self.task](self, batch, generator)


def _bindings(task: RecallTask, batch: int, generator: np.random.Generator, repeated: int) -> Sample:
    """Pairs at the start, the first ``repeated`` keys bound twice; then each key once more among filler."""
    B, P, T, half = batch, task.pairs, task.length, task.vocab // 2
    blank = int(task.filler == "blank")  # its id, 0, is then no key
    order = blank + generator.random((B, half - blank)).argsort(1)  # a permutation of the keys: the first P are bound, the others may be filler
    keys_BP, unused = order[:, :P], order[:, P:]
    bound = np.concatenate([keys_BP, keys_BP[:, :repeated]], 1)
    bound = np.take_along_axis(bound, generator.random(bound.shape).argsort(1), 1)
    values = generator.integers(half, task.vocab, bound.shape)
    start = 2 * bound.shape[1]

    if blank:
        tokens = np.zeros((B, T), np.int64)
    else:
        filler = generator.integers(0, task.vocab - P, (B, T))  # every id but the keys of this sequence
        tokens = np.where(filler < half - P, np.take_along_axis(unused, np.minimum(filler, half - P - 1), 1), filler + P)
    tokens[:, 0:start:2], tokens[:, 1:start:2] = bound, values

    slots = (T - start) // 2
    weight = task.gap_power * np.arange(1, slots + 1, dtype=np.float64) ** (task.gap_power - 1)
    race = generator.exponential(size=(B, slots)) / weight  # the P smallest are a draw without replacement by weight
    places = start + 2 * race.argsort(1)[:, :P]
    places = np.take_along_axis(places, generator.random((B, P)).argsort(1), 1)
    rows = np.arange(B)[:, None]
    tokens[rows, places] = keys_BP

    same = bound[:, None] == keys_BP[..., None]  # (B, P, bindings)
    last = same.shape[2] - 1 - same[..., ::-1].argmax(2)
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[rows, places] = np.take_along_axis(values, last, 1)
    gaps[rows, places] = places - 2 * last
    return tokens, targets, gaps


def _mqar(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    return _bindings(task, batch, generator, 0)


def _forgetting(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    return _bindings(task, batch, generator, task.pairs // 2)


def _copying(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    """0 is noise, 1 the mark; the tokens to copy are the others."""
    B, P, T = batch, task.pairs, task.length
    tokens = np.zeros((B, T), np.int64)
    places = np.sort(generator.random((B, T - P)).argsort(1)[:, :P], 1)
    wanted = generator.integers(2, task.vocab, (B, P))
    np.put_along_axis(tokens, places, wanted, 1)
    tokens[:, T - P :] = 1
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[:, T - P :] = wanted
    gaps[:, T - P :] = np.arange(T - P, T) - places
    return tokens, targets, gaps


def _induction(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    """0 is the mark, which stands once in the text and at its end."""
    B, T = batch, task.length
    tokens = generator.integers(1, task.vocab, (B, T))
    place = generator.integers(0, T - 2, B)
    rows = np.arange(B)
    tokens[rows, place] = 0
    tokens[:, -1] = 0
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[:, -1] = tokens[rows, place + 1]
    gaps[:, -1] = T - 1 - place
    return tokens, targets, gaps


def _zoology(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    """Facts from the data module of Zoology's repository; id 0 is neither key nor value."""
    B, P, T, half = batch, task.pairs, task.length, task.vocab // 2
    keys_BP = 1 + generator.random((B, half - 1)).argsort(1)[:, :P]
    values_BP = half + generator.random((B, task.vocab - half)).argsort(1)[:, :P]
    start = 2 * P
    tokens = generator.integers(0, task.vocab, (B, T))
    tokens[:, 0:start:2], tokens[:, 1:start:2] = keys_BP, values_BP
    slots = (T - start) // 2
    weight = task.gap_power * np.arange(1, slots + 1, dtype=np.float64) ** (task.gap_power - 1)
    # The order of the draw is kept: the first key has the first draw, which is likely a short gap.
    places = start + 2 * (generator.exponential(size=(B, slots)) / weight).argsort(1)[:, :P]
    rows = np.arange(B)[:, None]
    tokens[rows, places] = keys_BP
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[rows, places] = values_BP
    gaps[rows, places] = places - 2 * np.arange(P)
    return tokens, targets, gaps


def _parity(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    tokens = generator.integers(0, 2, (batch, task.length))
    return tokens, tokens.cumsum(1) % 2, np.broadcast_to(np.arange(1, task.length + 1), tokens.shape)


def _permutations(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    tokens = generator.integers(0, len(SWAPS), (batch, task.length))
    targets, rows = np.empty_like(tokens), np.arange(batch)
    order_BN = np.tile(np.arange(5), (batch, 1))
    ids = {tuple(order): i for i, order in enumerate(ORDERS.tolist())}
    for t in range(task.length):
        left, right = SWAPS[tokens[:, t]].T
        order_BN[rows, left], order_BN[rows, right] = order_BN[rows, right], order_BN[rows, left]
        targets[:, t] = [ids[tuple(order)] for order in order_BN.tolist()]
    return tokens, targets, np.broadcast_to(np.arange(1, task.length + 1), tokens.shape)


TASKS: dict[str, Callable[[RecallTask, int, np.random.Generator], Sample]] = {
    "mqar": _mqar, "zoology": _zoology, "forgetting": _forgetting, "copying": _copying, "induction": _induction,
    "parity": _parity, "permutations": _permutations,
}  # fmt: skip
