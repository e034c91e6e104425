"""Table 3: take the full model apart, one thing at a time. The rows train as those of Table 1 do: same tokens, same order, same start seeds."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.experiments.benchmark import Contender
from gam_lm.model import count_parameters
from gam_lm.presets import ABLATION_GROUPS, ABLATIONS
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

PAPER_SIZE = ModelConfig(vocab_size=10_000)
"""Where a row's parameters can be compared with the published counts."""


def plan_ablation(rows: Sequence[str], seeds: Sequence[int], full: ModelConfig, recipe: TrainConfig) -> list[Contender]:
    """All rows to train, seed by seed, so that an interrupted ablation has whole seeds.

    Args:
        rows: names of ABLATIONS or ABLATION_GROUPS, or FIELD=VALUE.
        seeds: of the start values and the order of the blocks.
        full: the full model, from which each row differs in one thing.
        recipe: how all of them train.

    Raises:
        InputError: for an unknown row, field or value, or a full model that is not gated.
    """
    if full.mixer != "gam" or full.fusion != "gate":
        raise InputError(f"the model to take apart has mixer={full.mixer!r} and fusion={full.fusion!r}: use mixer='gam' and fusion='gate', the rows change it")
    found: dict[str, tuple[ModelConfig, dict[str, Any]]] = {}
    for name in (each for row in rows for each in ABLATION_GROUPS.get(row, (row,))):
        changes = changes_of(name)
        config = full.replace(**changes)
        if config == full and name != "full":
            logger.info("%s: the full model has it already, the row is left out", name)
            continue
        columns = {"changes": changes, "paper_size_parameters": count_parameters(PAPER_SIZE.replace(**changes))}
        found[name] = config, columns
    return [
        Contender(name, config, recipe.replace(seed=seed), variant=full.initialization, columns=columns)
        for seed in dict.fromkeys(seeds)
        for name, (config, columns) in found.items()
    ]


def changes_of(row: str) -> dict[str, Any]:
    """The fields in which a row differs from the full model. Raises InputError for an unknown row."""
    if row in ABLATIONS:
        return dict(ABLATIONS[row])
    name, is_field, value = row.partition("=")
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    if not is_field:
        raise unknown_name("row", row, [*ABLATIONS, *ABLATION_GROUPS])
    if name not in fields:
        raise unknown_name(f"field of row {row!r}", name, fields)
    return {name: _value(value)}


def _value(text: str) -> Any:
    """A number, true, false or null as in JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
