"""Table 3: take the full model apart, one thing at a time. The rows train as those of Table 1 do: same tokens, same order, same seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.experiments.benchmark import Contender
from gam_lm.model import count_parameters
from gam_lm.presets.models import changed, changes_of
from gam_lm.presets.setups import ABLATION_GROUPS, ABLATIONS
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

PAPER_SIZE = ModelConfig.published(vocab_size=10_000)
"""Where a row's parameters can be compared with the published counts."""


def plan_ablation(rows: Sequence[str], seeds: Sequence[int], full: ModelConfig, recipe: TrainConfig) -> list[Contender]:
    """All rows to train, seed by seed, so that an interrupted ablation has whole seeds.

    Args:
        rows: names of ABLATIONS or ABLATION_GROUPS, or FIELD=VALUE.
        seeds: of the initialisation and the order of the blocks.
        full: the full model, from which each row differs in one thing.
        recipe: how all of them train.

    Raises:
        InputError: for an unknown row, field or value, or one that the full model does not have.
    """
    found: dict[str, tuple[ModelConfig, dict[str, Any]]] = {}
    for name in (each for row in rows for each in ABLATION_GROUPS.get(row, (row,))):
        changes = changes_of_row(name)
        config = changed(full, changes)
        if config != full and name == "full":
            said = ", ".join(f"{field}={value}" for field, value in changes.items())
            raise InputError(f"row 'full' is the model with {said}, which yours has not: start from one that has it")
        if config == full and name != "full":
            logger.info("%s: the full model has it already, the row is left out", name)
            continue
        columns = {"changes": changes, "paper_size_parameters": count_parameters(changed(PAPER_SIZE, changes))}
        found[name] = config, columns
    return [
        Contender(name, config, recipe.replace(seed=seed), variant=full.initialization, columns=columns)
        for seed in dict.fromkeys(seeds)
        for name, (config, columns) in found.items()
    ]


def changes_of_row(row: str) -> dict[str, Any]:
    """The fields in which a row differs from the full model. Raises InputError for an unknown row."""
    if row in ABLATIONS:
        return dict(ABLATIONS[row])
    if "=" not in row:
        raise unknown_name("row", row, [*ABLATIONS, *ABLATION_GROUPS])
    return changes_of(row)
