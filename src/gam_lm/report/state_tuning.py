"""What tuning the initial memory is worth, as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text


def state_tuning_table(results: Mapping[str, Any]) -> Table:
    """A line for each text and method, at the best of the learning rates that were tried for it."""
    groups: defaultdict[tuple[str, str], defaultdict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in results["rows"]:
        groups[row["task"], row["variant"]][row["train_config"]["learning_rate"]].append(row)
    lines: list[list[str]] = []
    untuned: dict[str, float] = {}
    for (text, method), by_rate in groups.items():
        bits, rate = min((mean(row["val_bits_per_byte"] for row in rows), rate) for rate, rows in by_rate.items())
        first = by_rate[rate][0]
        untuned.setdefault(text, bits)  # its row comes first
        tuned = first["trained_parameters"] > 0
        lines.append([
            text, method, f"{first['trained_parameters']:,}", f"{len(by_rate)}" if tuned else "", f"{rate:g}" if tuned else "", f"{bits:.4f}",
            f"{bits - untuned[text]:+.4f}" if tuned else "",
        ])  # fmt: skip
    columns = ["Text", "What is trained", "Numbers", "Learning rates tried", "Best one", "Bits per byte", "Against untuned"]
    steps = results["rows"][0]["train_config"] if results["rows"] else {}
    note = (
        f"{steps.get('steps')} steps of {steps.get('batch_size')} × {steps.get('context')} tokens. The learning rate was chosen on the validation text that is "
        "shown, from the same values for each method."
    )
    return Table(columns=columns, rows=lines, title="Tuning on another text", note=note)


def write_state_tuning(out: Path) -> str:
    """Write table.md in ``out``, and return it."""
    table = state_tuning_table(read_results(out / "results.json")).markdown()
    write_text(out / "table.md", table)
    return table
