"""The rows of recall, sorted for its tables and pictures: what was asked of which model, and which trainings count."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from gam_lm.report.rows import Row, by_variant
from gam_lm.results import fields_set

SHORT_GAPS = 0.01
"""The power of the gaps where nothing else is said."""

FILLER = "random"
"""What stands between pairs and questions where nothing else is said."""

STOP_EVERY = 50
"""Steps after which a training that may stop early looks whether it has learned its task."""

OF_A_TASK = ("context", "max_position_embeddings", "steps", "batch_size")
"""Fields of a configuration that come with the task or with the budget: they make another line of a table, not another model."""


class Size(NamedTuple):
    """A line of the tables: what was asked, and on how many sequences a model learned it."""

    task: str
    pairs: int
    length: int
    gap_power: float
    filler: str
    sequences: int
    stop_at: float | None

    def cells(self) -> list[str]:
        """The line's first cells."""
        task = self.task if self.gap_power == SHORT_GAPS else f"{self.task}, gaps^{self.gap_power:g}"
        task += "" if self.filler == FILLER else f", {self.filler} filler"
        return [task, str(self.pairs), f"{self.length:,}", f"{'≤ ' if self.stop_at else ''}{self.sequences:,}" if self.sequences else ""]


Asked = tuple[str, str, Size]
"""A model's name, its configuration as JSON, and what it was asked."""

SIZE_COLUMNS = ["Task", "Pairs", "Length", "Sequences seen"]


def models(results: Mapping[str, Any]) -> list[str]:
    """Names of the models: with the fields in which rows of one name differ, as far as the task does not set them."""
    return list(named_rows(results))


def by_size(results: Mapping[str, Any]) -> dict[Size, dict[str, list[Row]]]:
    """The rows by size, then by model; sizes in the order in which they first appear."""
    order: dict[Size, dict[str, list[Row]]] = {size_of(row): {} for row in _finished(results)}
    for model, rows in named_rows(results).items():
        for row in rows:
            order[size_of(row)].setdefault(model, []).append(row)
    return order


def named_rows(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows by `models`."""
    # A model may have another learning rate for each task: what was tuned makes no other model.
    return by_variant(_finished(results), aside=lambda row: (*OF_A_TASK, *row.get("tuned", ())))


def _finished(results: Mapping[str, Any]) -> list[Row]:
    """The rows of trainings that did not diverge, without the trials; where a model has trials on a line, those with the values of its best one alone."""
    best = {asked: row["tuned"] for asked, row in _best_trials(results).items()}
    rows = [row for row in results["rows"] if "pairs" in row and "trial" not in row and not row.get("diverged")]
    return [row for row in rows if row.get("tuned") == best.get(_asked(row), row.get("tuned"))]


def _best_trials(results: Mapping[str, Any]) -> dict[Asked, Row]:
    """The best trial of each model on each line, as `gam recall` chooses it; diverged ones are never it."""
    best: dict[Asked, Row] = {}
    trials = [row for row in results["rows"] if "pairs" in row and "trial" in row and not row.get("diverged")]
    for row in sorted(trials, key=order_of_trials):
        best.setdefault(_asked(row), row)
    return best


def order_of_trials(row: Row) -> tuple[float, ...]:
    """Smallest for the best: that which learned its task in the fewest steps, else that with the most right answers, then with the lowest loss."""
    return (row.get("learned_at", math.inf), -row["accuracy"], row["curve"][-1]["train_nats"] if row.get("curve") else 0.0, row["trial"])


def _asked(row: Row) -> Asked:
    """Which model was asked what."""
    model = {name: value for name, value in fields_set(row, "model_config").items() if name not in OF_A_TASK}
    return row["model"], json.dumps(model, sort_keys=True), size_of(row)


def trials_said(results: Mapping[str, Any]) -> str:
    """What a table says of how the recipes were found."""
    trials = [row for row in results["rows"] if "trial" in row]
    if not trials:
        return ""
    fields = ", ".join(dict.fromkeys(field.replace("_", " ") for row in trials for field in row["tuned"]))
    counts = sorted(set(Counter(_asked(row) for row in trials).values()))
    return f" Each model's {fields} on each line is the best of {' or '.join(map(str, counts))} trials, on a seed and sequences of their own."


def diverged_said(results: Mapping[str, Any]) -> str:
    """What a table says of the others."""
    rows = [row for row in results["rows"] if row.get("diverged") and "trial" not in row]
    lost = [f"{row['model']} (seed {row['seed']}, {row['pairs']} pairs, {row['sequence_length']:,} tokens)" for row in rows]
    return f" Diverged: {', '.join(lost)}." if lost else ""


def size_of(row: Row) -> Size:
    """What a row was asked."""
    budget = row.get("train_config", {})
    sequences = budget.get("steps", 0) * budget.get("batch_size", 0)
    return Size(row["task"], row["pairs"], row["sequence_length"], row.get("gap_power", SHORT_GAPS), row.get("filler", FILLER), sequences, row.get("stop_at"))
