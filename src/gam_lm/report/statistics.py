"""Mean, spread and 95 % interval over seeds, and paired differences over the same seeds and the same validation blocks.

A difference of two models varies for two reasons: another seed would have trained other models, another text would have asked other questions.
With d_sb the difference in loss for seed s on block b, seeds and blocks are crossed, and the variance of the mean difference is at most

    v = s²(seed means) / seeds + s²(block means) / blocks

(the interaction is counted twice, which makes the interval a little too wide, as does the pigeonhole bootstrap of Owen, Annals of Applied Statistics 2007, for
crossed factors). Neighbouring blocks come from one page, so the second term takes means over √blocks runs of neighbours instead of single blocks
(batch means, Flegal & Jones, Annals of Statistics 2010). The interval is ± t √v, with Welch and Satterthwaite's degrees of freedom. Pairing is what makes it
narrow: how hard a block is, and what a seed's order of blocks does to all models, cancels (Miller, Adding Error Bars to Evals, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


def paired_blocks(a: Sequence[tuple[Array, Array]], b: Sequence[tuple[Array, Array]]) -> Summary:
    """The difference a − b in nats per token over the same seeds and the same validation blocks.

    Args:
        a: for each seed the nats and the predicted tokens of each block, as gam_lm.results.read_blocks gives them.
        b: the same of the other model, seed by seed.

    Returns:
        ``count`` seeds, the mean, the deviation over seeds, and a half width that counts seeds and blocks as this file's head says. With one seed
        it counts the text alone: what another seed would change is not known, and :func:`verdict` says so.

    Raises:
        ValueError: where seeds or blocks are not the same.
    """
    nats_SB = np.stack([x[0].astype(np.float64) - y[0] for x, y in zip(a, b, strict=True)])
    tokens_B = a[0][1].astype(np.float64)
    if any(not np.array_equal(each[1], a[0][1]) for each in (*a, *b)):
        raise ValueError("the blocks are not the same")
    per_seed = summarise([float(x) for x in nats_SB.sum(1) / tokens_B.sum()])
    terms = [(per_seed.deviation**2 / per_seed.count, per_seed.count - 1)] if per_seed.count > 1 else []
    runs = [part for part in np.array_split(np.arange(len(tokens_B)), max(1, math.isqrt(len(tokens_B)))) if len(part)]
    if len(runs) > 1:
        mean_B = nats_SB.mean(0)
        # A run's weight is its tokens: only the last block is shorter.
        weight_R = np.array([tokens_B[run].sum() for run in runs])
        deviation_R = np.array([mean_B[run].sum() for run in runs]) - per_seed.mean * weight_R
        terms.append((float((deviation_R**2).sum()) * len(runs) / (len(runs) - 1) / float(tokens_B.sum()) ** 2, len(runs) - 1))
    if not terms:
        return per_seed
    variance = sum(each for each, _ in terms)
    if variance == 0:
        return Summary(per_seed.count, per_seed.mean, per_seed.deviation, 0.0)
    freedom = max(1, math.floor(variance**2 / sum(each**2 / degrees for each, degrees in terms)))
    return Summary(per_seed.count, per_seed.mean, per_seed.deviation, t_quantile(0.975, freedom) * math.sqrt(variance))


def shown(difference: Summary) -> bool:
    """Whether the 95 % interval of a difference leaves out zero."""
    return abs(difference.mean) > difference.half_width


def verdict(difference: Summary, a: str, b: str, unit: str) -> str:
    """A difference in plain words; lower is better."""
    over = f"{difference.count} seed{'s' if difference.count > 1 else ''}, paired"
    width = "unknown" if difference.half_width == math.inf else f"{difference.half_width:.4f}"
    if not shown(difference):
        return f"{a} and {b}: no difference shown ({difference.mean:+.4f} ± {width} {unit}, {over})"
    lower, higher = (a, b) if difference.mean < 0 else (b, a)
    words = f"{lower} is lower than {higher} by {abs(difference.mean):.4f} ± {width} {unit} ({over})"
    return words if difference.count > 1 else f"{words}; of these two runs only: one seed does not tell models apart"


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
