"""What a study tries: a space of recipe fields, and the points of it in an order that depends on the study's seed alone. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gam_lm.errors import InputError, unknown_name
from gam_lm.training.recipe import TrainConfig

WIDER = 2.0
"""Factor by which a range grows beyond an edge."""

Point = Mapping[str, float]
"""The values of one trial, by field."""

Numbered = tuple[int, Point]
"""A point and the number of its trial."""


@dataclass(frozen=True)
class Range:
    """A field of the recipe between two values, searched on a logarithmic scale."""

    field: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Range:
        """``field=low:high``. Raises InputError for anything else, and for a field that is not a number of the recipe."""
        field, _, values = text.partition("=")
        numbers = [each.name for each in dataclasses.fields(TrainConfig) if "float" in str(each.type)]
        if field not in numbers:
            raise unknown_name("field of the recipe to search", field, numbers)
        try:
            low, high = (float(value) for value in values.split(":"))
        except ValueError:
            raise InputError(f"search is {text!r}: write it as field=low:high, such as learning_rate=1e-3:1.6e-2") from None
        if not 0 < low < high < math.inf:
            raise InputError(f"search is {text!r}: use 0 < low < high, the range is searched on a logarithmic scale")
        for end in (low, high):
            try:
                TrainConfig.from_dict({field: end})
            except InputError as error:
                raise InputError(f"search is {text!r}, and {error}") from None
        return cls(field, low, high)

    def at(self, share: float) -> float:
        """The value at a share of the range, with three significant digits."""
        value = float(f"{self.low * (self.high / self.low) ** share:.3g}")
        return value if _taken(self.field, value) else self.low * (self.high / self.low) ** share  # the rounding may pass a bound of the recipe


@dataclass(frozen=True, kw_only=True)
class Search:
    """Trials of every model on every task of recall, whose best recipe the seeds then have."""

    space: tuple[Range, ...]
    """What is tried."""
    trials: int
    """Of each model on each task, at the same points for all."""
    seed: int = 1000
    """Of the trials' initialisation and samples, and of the points."""


def points(space: Sequence[Range], count: int, seed: int) -> list[dict[str, float]]:
    """The first ``count`` points: an additive recurrence on the roots of x^(d+1) = x + 1, which fills a space of d dimensions evenly for every count.

    Source: M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018); for d = 1 the golden ratio.
    """
    d = len(space)
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (d + 1))
    start = np.random.default_rng(seed).random(d)
    steps = root ** -np.arange(1, d + 1)
    return [{each.field: each.at(float(share)) for each, share in zip(space, (start + steps * k) % 1, strict=True)} for k in range(count)]


def key_of(values: Point) -> tuple[tuple[str, float], ...]:
    """What tells a point from the others, whichever file or database it was read from."""
    return tuple(sorted((field, float(f"{value:.6g}")) for field, value in values.items()))


def numbered(wanted: Sequence[Point], known: Sequence[Numbered]) -> list[Numbered]:
    """Each point that is wanted with the number that it has among the ``known`` ones; a new one has the next that is free.

    A number belongs to one point: where known trials of two points share one, the first of them keeps it.
    """
    numbers: dict[Any, int] = {}
    for index, values in known:
        if index not in numbers.values():
            numbers.setdefault(key_of(values), index)
    free = 1 + max((index for index, _ in known), default=-1)
    found = []
    for values in wanted:
        if key_of(values) not in numbers:
            numbers[key_of(values)] = free
            free += 1
        found.append((numbers[key_of(values)], values))
    return found


def not_among(known: Sequence[Numbered], plan: Sequence[Point]) -> list[Point]:
    """The known points that a plan does not have, each once, by number."""
    there = {key_of(values) for values in plan}
    return list({key_of(values): values for _, values in sorted(known, key=lambda each: each[0]) if key_of(values) not in there}.values())


def stretch_points(stretch: Range, drawn: Sequence[Point], plan: Sequence[Point], known: Sequence[Numbered]) -> list[Point]:
    """What a stretch beyond an edge is tried at: the points that are ``drawn`` for it, or those of it that the study knows beside its plan.

    A study that gains models may widen its ranges in another order than before. What other models tried in the stretch is then taken over, so that all have the
    same trials; a study that is repeated knows the points that are drawn, and takes these.
    """
    before = not_among(known, plan)
    if {key_of(values) for values in drawn} & {key_of(values) for values in before}:
        return list(drawn)
    return [values for values in before if stretch.low <= values[stretch.field] <= stretch.high] or list(drawn)


def edges(space: Sequence[Range], tried: Sequence[Point], best: Sequence[Point]) -> list[Range]:
    """The ranges to add because a best value is the lowest or highest that was tried, as far as the recipe takes their values.

    Args:
        space: what was searched.
        tried: the values of all trials of a model; every model has the same.
        best: the best trial's values of every model.

    Returns:
        Stretches beyond an edge, each as wide as `WIDER`.
    """
    found = []
    for each in space:
        low, high = min(values[each.field] for values in tried), max(values[each.field] for values in tried)
        if any(values[each.field] == low for values in best):
            found.append(Range(each.field, low / WIDER, low / WIDER**0.25))
        if any(values[each.field] == high for values in best) and _taken(each.field, high * WIDER**0.25):
            found.append(Range(each.field, high * WIDER**0.25, _highest_taken(each.field, high * WIDER**0.25, high * WIDER)))
    return found


def _taken(field: str, value: float) -> bool:
    """Whether the recipe takes a value; the bounds below are all 0, which a range never reaches."""
    try:
        TrainConfig.from_dict({field: value})
    except InputError:
        return False
    return True


def _highest_taken(field: str, low: float, high: float) -> float:
    """The end of a stretch from ``low``, which the recipe takes, at most ``high``."""
    if _taken(field, high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _taken(field, middle) else (low, middle)
    return low


def more_trials(space: Sequence[Range], added: Range, count: int) -> int:
    """How many points the added stretch gets for the density that ``count`` points have over the space."""
    old = next(each for each in space if each.field == added.field)
    return max(1, math.ceil(count * math.log(added.high / added.low) / math.log(old.high / old.low) - 1e-9))


def best_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By model: the trial of the lowest validation loss; diverged and pruned ones are left out."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "tuned" not in row or row.get("diverged") or row.get("pruned"):
            continue
        name = str(row["model"])
        if name not in found or row["val_nats_per_token"] < found[name]["val_nats_per_token"]:
            found[name] = row
    return found


def best_recipe(rows: Sequence[Mapping[str, Any]], name: str, recipe: TrainConfig, study: Path) -> TrainConfig:
    """``recipe`` with the best values that a study found for a model. Raises InputError where the study does not have it."""
    best = best_rows(rows)
    if name not in best:
        raise InputError(f"tuned is {str(study)!r}, which has no finished trial of {name!r}: it has {', '.join(best) or 'none'}")
    return recipe.replace(**best[name]["tuned"])
