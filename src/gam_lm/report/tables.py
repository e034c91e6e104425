"""Tables from results.json alone, made once and shown as Markdown or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gam_lm.report.rows import Row, by_model, by_variant, floor_name, floors, trained
from gam_lm.report.statistics import summarise


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are shown. The first column names the row; the others are figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What stands below: where the figures come from."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"the row {row} has {len(row)} cells, there are {len(self.columns)} columns")

    def markdown(self) -> str:
        """As Markdown, ending in a line break."""
        lines = [cells_line(self.columns), "|---" + "|--:" * (len(self.columns) - 1) + "|", *(cells_line(row) for row in self.rows)]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def cells_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def quality(results: Mapping[str, Any]) -> Table:
    """Table 1's columns (model, parameters, seconds per epoch, validation loss, perplexity) and what tells more.

    A model's rows are averaged over its seeds; ± is the 95 % interval of the mean. The floors stand last.
    """
    rows = trained(results)
    columns = ["Model", "Parameters", "s/epoch", "Val loss (nats)", "PPL", "Bits/byte", "Tokens/s", "State (bytes)", "Seeds"]
    paper = any("paper_val_ppl" in row for row in rows)
    lines = []
    for name, group in by_variant(rows).items():
        lines.append([
            name, f"{group[0]['parameters']:,}", mean(group, "epoch_seconds", "{:,.0f}"), interval(group, "val_nats_per_token", "{:.4f}"),
            mean(group, "val_ppl", "{:,.2f}"), mean(group, "val_bits_per_byte", "{:.4f}"), mean(group, "tokens_per_second", "{:,.0f}"),
            f"{group[0]['state_bytes']:,}", str(len(group)),
        ])  # fmt: skip
        if paper:
            lines[-1].insert(5, mean(group, "paper_val_ppl", "{:,.2f}"))
    if paper:
        columns.insert(5, "PPL (paper's protocol)")
    for row in floors(results):
        lines.append(floor_cells(row, columns))
    return Table(columns=columns, rows=lines, note=provenance(results))


FLOOR_CELLS = {
    "Val loss (nats)": ("val_nats_per_token", "{:.4f}"), "PPL": ("val_ppl", "{:,.2f}"), "Bits/byte": ("val_bits_per_byte", "{:.4f}"),
}  # fmt: skip


def floor_cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A floor's cells under ``columns``: its name, and what it has of loss, perplexity and bits per byte."""
    figures = [FLOOR_CELLS[name][1].format(row[FLOOR_CELLS[name][0]]) if name in FLOOR_CELLS else "" for name in columns]
    return [f"*{floor_name(row)}*", *figures[1:]]


def quality_table(results: Mapping[str, Any]) -> str:
    """:func:`quality` as Markdown."""
    return quality(results).markdown()


def recall(results: Mapping[str, Any]) -> Table:
    """Accuracy by task and size, a column per model, with the bytes that each carries from token to token; ± is the 95 % interval over seeds."""
    rows = [row for row in results["rows"] if "pairs" in row]
    models = list(by_model(rows))
    lines = []
    for task, pairs, length in dict.fromkeys((row["task"], row["pairs"], row["sequence_length"]) for row in rows):
        cells = [task, str(pairs), str(length)]
        for model in models:
            group = [row for row in rows if (row["model"], row["task"], row["pairs"], row["sequence_length"]) == (model, task, pairs, length)]
            if not group:
                cells.append("")
                continue
            summary = summarise([100 * row["accuracy"] for row in group])
            spread = f" ± {summary.half_width:.1f}" if summary.count > 1 else ""
            cells.append(f"{summary.mean:.1f} %{spread} ({group[0]['state_bytes'] / 1024:,.0f} KiB)")
        lines.append(cells)
    machine = results["environment"]
    note = f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}."
    return Table(columns=["Task", "Pairs", "Length", *models], rows=lines, note=note)


def recall_table(results: Mapping[str, Any]) -> str:
    """:func:`recall` as Markdown."""
    return recall(results).markdown()


def provenance(results: Mapping[str, Any]) -> str:
    """One line on the corpus and the machine."""
    corpus, machine = results["corpus"], results["environment"]
    words = [f"{corpus['name']} (sha256 {corpus['sha256'][:12]}, {corpus['tokens']:,} training tokens, tokenizer {corpus['tokenizer']})"]
    if rows := [row for row in trained(results) if "train_tokens" in row]:
        words.append(f"{rows[0]['train_tokens']:,} tokens trained")
    words.append(f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}")
    return "; ".join(words) + "."


def mean(group: Sequence[Row], key: str, form: str) -> str:
    """The mean of a column over the rows that have it; empty where none has."""
    values = [row[key] for row in group if key in row]
    return form.format(summarise(values).mean) if values else ""


def interval(group: Sequence[Row], key: str, form: str) -> str:
    """The mean of a column, with its 95 % interval where there is more than one row."""
    summary = summarise([row[key] for row in group])
    return form.format(summary.mean) + (f" ± {form.format(summary.half_width)}" if math.isfinite(summary.half_width) else "")
