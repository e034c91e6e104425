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
        return cls(field, low, high)

    def at(self, share: float) -> float:
        """The value at a share of the range, with three significant digits."""
        return float(f"{self.low * (self.high / self.low) ** share:.3g}")


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


def edges(space: Sequence[Range], tried: Sequence[Mapping[str, float]], best: Sequence[Mapping[str, float]]) -> list[Range]:
    """The ranges to add because a best value is the lowest or highest that was tried.

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
        if any(values[each.field] == high for values in best):
            found.append(Range(each.field, high * WIDER**0.25, high * WIDER))
    return found


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
