"""Mean, spread and 95 % interval over seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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


def verdict(difference: Summary, a: str, b: str, unit: str) -> str:
    """A difference in plain words; lower is better."""
    if difference.half_width == math.inf or abs(difference.mean) <= difference.half_width:
        return f"{a} and {b}: no difference shown ({difference.mean:+.4f} ± {difference.half_width:.4f} {unit}, {difference.count} seeds)"
    lower, higher = (a, b) if difference.mean < 0 else (b, a)
    return f"{lower} is lower than {higher} by {abs(difference.mean):.4f} ± {difference.half_width:.4f} {unit} ({difference.count} seeds, paired)"


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
