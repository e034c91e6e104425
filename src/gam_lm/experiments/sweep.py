"""A sweep: every model with several values of one or more numbers, and which of them are the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import torch

from gam_lm.experiments.benchmark import Contender, identity_of, plan
from gam_lm.presets.models import Fields
from gam_lm.results import Results
from gam_lm.training.recipe import TrainConfig


def sweep(
    values: Mapping[str, Sequence[float]], names: Sequence[str], seeds: Sequence[int], base: Fields, recipe: TrainConfig, *, match: bool
) -> list[Contender]:
    """All rows: every model, seed and combination of values, seed by seed.

    Args:
        values: of fields of the recipe, and of those that the models share.
        names: of the models.
        seeds: a row for each.
        base: what the models share.
        recipe: what the rows share.
        match: as of `plan`, at each combination of its own.

    Raises:
        InputError: for a value that cannot be used.
    """
    rows = []
    for chosen in (dict(zip(values, some, strict=True)) for some in product(*values.values())):
        of_recipe, of_model = _of_recipe_and_model(chosen)
        for each in plan(names, seeds, {**base, **of_model}, recipe.replace(**of_recipe), match=match):
            rows.append(Contender(each.name, each.config, each.recipe, variant="-".join(_said(chosen)), columns={"swept": chosen}))
    return sorted(rows, key=lambda each: list(seeds).index(each.recipe.seed))


def values_said(row: Mapping[str, Any]) -> str:
    """``, learning_rate=0.002`` where the row is of a sweep."""
    return "".join(f", {each}" for each in _said(row.get("swept", {})))


def best_of_sweep(contenders: Sequence[Contender], results: Results, device: torch.device) -> Iterator[str]:
    """A line for each model: its best values by the mean validation loss of its seeds, and how far the others are from them.

    Models of different sizes are different models, each with a best recipe of its own, where a recipe is swept as well.
    """
    losses: dict[str, dict[tuple[str, ...], list[float]]] = {}
    chosen: dict[tuple[str, ...], Mapping[str, float]] = {}
    for each in contenders:
        row = results.find(identity_of(each, device))
        if row is None:  # another process trains it
            continue
        of_recipe, of_model = _of_recipe_and_model(each.columns["swept"])
        name = f"{each.name} ({', '.join(_said(of_model))})" if of_model and of_recipe else each.name
        compared = of_recipe or of_model
        said = tuple(_said(compared))
        chosen[said] = compared
        losses.setdefault(name, {}).setdefault(said, []).append(float("inf") if row.get("diverged") else row["val_nats_per_token"])
    for name, by_values in losses.items():
        best, *others = sorted((fmean(nats), said) for said, nats in by_values.items())
        if best[0] == float("inf"):
            yield f"{name}: every value diverged in a seed at least; try lower learning rates or a smaller clip"
            continue
        rest = "; ".join(f"{' '.join(said)}: {'diverged' if nats == float('inf') else f'+{nats - best[0]:.4f}'}" for nats, said in others)
        yield f"{name}: best with {' '.join(best[1])}, {best[0]:.4f} nats per token; {rest}{_edges(chosen[best[1]], list(chosen.values()))}"


def _of_recipe_and_model(values: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    fields = {each.name for each in dataclasses.fields(TrainConfig)}
    return {field: value for field, value in values.items() if field in fields}, {field: value for field, value in values.items() if field not in fields}


def _edges(best: Mapping[str, float], tried: Sequence[Mapping[str, float]]) -> str:
    """What to try next where a best value is the lowest or highest of all."""
    found = []
    for field, value in best.items():
        values = {each[field] for each in tried}
        if len(values) > 1 and value in (min(values), max(values)):
            found.append(f"{field} is the {'lowest' if value == min(values) else 'highest'} that was tried")
    return f" ({', '.join(found)})" if found else ""


def _said(chosen: Mapping[str, float]) -> list[str]:
    return [f"{field}={value:g}" if isinstance(value, float) else f"{field}={value}" for field, value in chosen.items()]
