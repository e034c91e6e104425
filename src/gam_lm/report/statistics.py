"""Mean, spread and 95 % interval over seeds, and paired differences of two models over the same seeds, blocks and documents.

A difference of two models varies for three reasons: another seed would have trained other models, another block of the text would have asked other
questions, and another document (a book) would have suited one model better. Pairing removes what all models share: how hard a block is, and what a seed's
order of blocks does to all of them (Miller, Adding Error Bars to Evals, arXiv 2411.00640). Four intervals look at what is left:

    seeds                 Student's t over the means of the seeds
    seeds and blocks      s²(seed means)/S + s²(run means)/R, crossed; a run is √blocks neighbouring blocks (batch means, Flegal & Jones, Annals of Statistics 2010)
    documents             Student's t over the means of the documents, each averaged over the seeds
    seeds and documents   s²(seed means)/S + s²(document means)/D, crossed

The crossed ones add the two variances, which counts the interaction twice and so errs to the wide side, as Owen's pigeonhole bootstrap does (Annals of Applied
Statistics 2007); their degrees of freedom are Welch and Satterthwaite's. **The interval that we report is the widest of the four**: over few seeds, or few books, a
single one misses what it does not look at. tests/test_statistics.py simulates how often it holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Summary:
    """Several measurements of one thing."""

    count: int
    mean: float
    deviation: float
    """Sample standard deviation; 0 for one measurement."""
    half_width: float
    """Half the 95 % interval of the mean, by Student's t; infinite for one measurement."""


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample deviation and 95 % interval. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to summarise")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, 0.0, math.inf)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return Summary(n, mean, deviation, t_quantile(0.975, n - 1) * deviation / math.sqrt(n))


def paired(a: Sequence[float], b: Sequence[float]) -> Summary:
    """The differences a − b of measurements that share seed and data. Raises ValueError where they are not as many."""
    return summarise([x - y for x, y in zip(a, b, strict=True)])


@dataclass(frozen=True)
class Estimate:
    """One of the four looks at a difference."""

    over: str
    """What varies: seeds, blocks, documents."""
    error: float
    """Standard error of the mean difference."""
    freedom: int
    """Degrees of freedom of Student's t."""

    def half_width(self, level: float) -> float:
        """Half the interval at ``level``, such as 0.95."""
        return t_quantile((1 + level) / 2, self.freedom) * self.error

    def p_value(self, mean: float) -> float:
        """Two-sided p-value of no difference."""
        if self.error == 0:
            return 1.0 if mean == 0 else 0.0
        return max(0.0, 2 * (1 - t_distribution(abs(mean) / self.error, self.freedom)))


@dataclass(frozen=True)
class Difference(Summary):
    """The paired difference of two models; ``half_width`` is that of the widest estimate at ``level``, infinite for one seed."""

    estimates: tuple[Estimate, ...] = ()
    """Empty for one seed: it describes two runs and compares no models."""
    level: float = 0.95
    documents: int | None = None
    """Documents of the text; None where the rows do not tell."""

    @property
    def widest(self) -> Estimate | None:
        """The estimate that gives the interval."""
        return max(self.estimates, key=lambda each: each.half_width(self.level), default=None)

    @property
    def p_value(self) -> float | None:
        """The largest p-value of the estimates, so that it is below 1 − level exactly where the widest interval leaves out zero; None for one seed."""
        return max((each.p_value(self.mean) for each in self.estimates), default=None)

    def at(self, level: float) -> Difference:
        """The same difference with its interval at another level."""
        return replace(self, level=level, half_width=_half_width(self.estimates, level))


def paired_seeds(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The difference a − b of losses by seed, where losses by block are not known. Raises ValueError where they are not as many."""
    by_seed = paired(a, b)
    return _difference(by_seed, _over_seeds(by_seed))


def paired_blocks(a: Sequence[tuple[Array, Array]], b: Sequence[tuple[Array, Array]], document_B: Array | None = None) -> Difference:
    """The difference a − b in nats per token over the same seeds and the same blocks.

    Args:
        a: for each seed the nats and the predicted tokens of each block, as gam_lm.results.read_blocks gives them.
        b: the same of the other model, seed by seed.
        document_B: the document of each block, a number each; None where it is not known.

    Returns:
        The difference over all tokens, with the widest of the four intervals of this file's head. Two documents are needed for those over documents.

    Raises:
        ValueError: where seeds or blocks are not the same.
    """
    nats_SB = np.stack([x[0].astype(np.float64) - y[0] for x, y in zip(a, b, strict=True)])
    tokens_B = a[0][1].astype(np.float64)
    if any(not np.array_equal(each[1], a[0][1]) for each in (*a, *b)):
        raise ValueError("the blocks are not the same")
    by_seed = summarise([float(x) for x in nats_SB.sum(1) / tokens_B.sum()])
    found = _over_seeds(by_seed)
    if not found:
        return _difference(by_seed, [], document_B)
    (seeds,) = found
    mean_B = nats_SB.mean(0)
    if blocks := _over_blocks(mean_B, tokens_B, by_seed.mean):
        found.append(_crossed("seeds and blocks", seeds, blocks))
    if document_B is not None and (documents := _over_documents(mean_B, tokens_B, document_B)):
        found += [documents, _crossed("seeds and documents", seeds, documents)]
    return _difference(by_seed, found, document_B)


def _over_seeds(by_seed: Summary) -> list[Estimate]:
    return [Estimate("seeds", by_seed.deviation / math.sqrt(by_seed.count), by_seed.count - 1)] if by_seed.count > 1 else []


def _over_blocks(nats_B: Array, tokens_B: Array, mean: float) -> Estimate | None:
    """Over runs of neighbouring blocks, which come from one page and go together."""
    runs = np.array_split(np.arange(len(tokens_B)), max(1, math.isqrt(len(tokens_B))))
    if len(runs) < 2:
        return None
    # A run's weight is its tokens: only the last block is shorter.
    deviation_R = np.array([nats_B[run].sum() - mean * tokens_B[run].sum() for run in runs])
    variance = float((deviation_R**2).sum()) * len(runs) / (len(runs) - 1) / float(tokens_B.sum()) ** 2
    return Estimate("blocks", math.sqrt(variance), len(runs) - 1)


def _over_documents(nats_B: Array, tokens_B: Array, document_B: Array) -> Estimate | None:
    """Over documents that count alike in the deviation and by their tokens in the mean.

    The mean over tokens weighs the documents by w. If they vary with σ², it varies with σ² Σ w²: the largest documents decide how many there are in effect.
    """
    _, place_B = np.unique(document_B, return_inverse=True)
    tokens_D = np.bincount(place_B, tokens_B)
    if len(tokens_D) < 2:
        return None
    by_document = summarise([float(x) for x in np.bincount(place_B, nats_B) / tokens_D])
    share_D = tokens_D / tokens_D.sum()
    return Estimate("documents", by_document.deviation * math.sqrt(float((share_D**2).sum())), len(tokens_D) - 1)


def _crossed(over: str, first: Estimate, second: Estimate) -> Estimate:
    """Both sources together: the variances add, with Welch and Satterthwaite's degrees of freedom, rounded down."""
    variances = [each.error**2 for each in (first, second)]
    total = sum(variances)
    if total == 0:
        return Estimate(over, 0.0, first.freedom)
    freedom = total**2 / sum(variance**2 / each.freedom for variance, each in zip(variances, (first, second), strict=True))
    return Estimate(over, math.sqrt(total), max(1, math.floor(freedom)))


def _difference(by_seed: Summary, estimates: Sequence[Estimate], document_B: Array | None = None) -> Difference:
    documents = None if document_B is None else len(np.unique(document_B))
    return Difference(
        by_seed.count, by_seed.mean, by_seed.deviation, _half_width(estimates, 0.95), estimates=tuple(estimates), documents=documents
    )  # fmt: skip


def _half_width(estimates: Sequence[Estimate], level: float) -> float:
    return max((each.half_width(level) for each in estimates), default=math.inf)


def shown(difference: Summary) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return abs(difference.mean) > difference.half_width


def holm(p_values: Sequence[float], error: float = 0.05) -> list[tuple[float, float]]:
    """Holm's step-down correction for several comparisons (Scandinavian Journal of Statistics 1979).

    Args:
        p_values: one for each comparison.
        error: the chance that at least one finding is false.

    Returns:
        For each comparison, in the order given, its corrected p-value, and the level whose interval leaves out zero exactly where that is below
        ``error``: 1 − error / (comparisons that were not rejected before it), from the first that is not rejected on the same for all.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found = [(1.0, 1.0)] * len(p_values)
    corrected, left = 0.0, len(p_values)
    for rank, i in enumerate(order):
        corrected = max(corrected, min(1.0, p_values[i] * (len(p_values) - rank)))
        found[i] = corrected, 1 - error / left
        left -= corrected < error
    return found


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with ``freedom`` degrees stays below with ``probability`` ≥ 0.5, by bisection of its distribution."""
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, freedom: int) -> float:
    """P(T ≤ t) for whole degrees of freedom, by the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cos, cos if freedom > 1 else 0.0
        for i in range(3, freedom - 1, 2):
            term *= cos * cos * (i - 1) / i
            total += term
        inside = 2 / math.pi * (angle + sin * total)
    else:
        term = total = 1.0
        for i in range(2, freedom - 1, 2):
            term *= cos * cos * (i - 1) / i
            total += term
        inside = sin * total
    return 0.5 + inside / 2
