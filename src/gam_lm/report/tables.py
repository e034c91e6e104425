"""Tables from results.json alone, made once and shown as Markdown or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gam_lm.report.compare import difference_words, diverged, measured, over_the_lowest, with_interval
from gam_lm.report.rows import Row, by_model, by_variant, common_curve, elsewhere, floor_name, floors, footnotes, trained
from gam_lm.report.statistics import summarise


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are shown. The first column names the row; the others are figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    floors: Sequence[Sequence[str]] = ()
    """Rows of what takes no model, set apart at the end."""
    title: str = ""
    """What the table shows, where it stands on a page."""
    note: str = ""
    """What stands below: where the figures come from."""

    def __post_init__(self) -> None:
        for row in (*self.rows, *self.floors):
            if len(row) != len(self.columns):
                raise ValueError(f"the row {row} has {len(row)} cells, there are {len(self.columns)} columns")

    def markdown(self) -> str:
        """As Markdown, ending in a line break."""
        lines = [cells_line(self.columns), "|---" + "|--:" * (len(self.columns) - 1) + "|", *(cells_line(row) for row in self.rows)]
        lines += [cells_line([f"*{row[0]}*", *row[1:]]) for row in self.floors]
        return "\n".join([*lines, *(["", one_line(self.note)] if self.note else []), ""])


def cells_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def one_line(text: object) -> str:
    """Text from a results.json as Markdown shows it: on one line, and never read as HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def quality(results: Mapping[str, Any], directory: Path | None = None) -> Table:
    """Table 1's columns (model, parameters, seconds per epoch, validation loss, perplexity) and what tells more.

    A model's rows are averaged over its seeds; ± is the 95 % interval of the mean. The floors stand last.

    Args:
        results: content of a results.json of trained models.
        directory: its folder; with it the table says how far each model is from the one of the lowest loss, paired by seed, block and document.
            A training that diverged is shown as such; it counts in no mean and is never the lowest.
    """
    rows = [row for row in trained(results) if not row.get("pruned")]
    columns = ["Model", "Parameters", "s/epoch", "Val loss (nats)", "PPL", "Bits/byte", "Tokens/s", "State (bytes)", "Seeds"]
    lines = [
        [
            name, f"{group[0]['parameters']:,}", mean(group, "epoch_seconds", "{:,.0f}"), interval(finite(group), "val_nats_per_token", "{:.4f}"),
            mean(finite(group), "val_ppl", "{:,.2f}"), mean(finite(group), "val_bits_per_byte", "{:.4f}"), mean(group, "tokens_per_second", "{:,.0f}"),
            mean(group[:1], "state_bytes", "{:,.0f}"), seeds(group),
        ]
        for name, group in by_variant(rows).items()
    ]  # fmt: skip
    if any("paper_val_ppl" in row for row in rows):
        paper = [mean(finite(group), "paper_val_ppl", "{:,.2f}") for group in by_variant(rows).values()]
        _insert(columns, lines, 5, "PPL (paper's protocol)", paper)
    note = provenance(results)
    if directory is not None and len(lines) > 1:
        lowest, over = over_the_lowest(measured(results, directory))
        _insert(columns, lines, 4, "Loss over the lowest (nats)", ["lowest" if line[0] == lowest else difference_words(over.get(line[0])) for line in lines])
        note = f"{INTERVALS} {note}"
    return Table(columns=columns, rows=lines, floors=[floor_cells(row, columns) for row in floors(results)], title="Quality", note=note)


def text_tables(results: Mapping[str, Any]) -> list[Table]:
    """The loss of each model on texts of other kinds than it was trained on; no table where none was measured."""
    groups = {name: finite(group) for name, group in by_variant(trained(results)).items()}
    texts = list(dict.fromkeys(text for group in groups.values() for row in group for text in row.get("texts", {})))

    def cell(group: Sequence[Row], text: str) -> str:
        found = [row["texts"][text] for row in group if text in row.get("texts", {})]
        return f"{interval(found, 'nats_per_token', '{:.4f}')} ({mean(found, 'bits_per_byte', '{:.3f}')})" if found else ""

    lines = [[name, *(cell(group, text) for text in texts)] for name, group in groups.items() if any("texts" in row for row in group)]
    note = "Nats per token of the model's own tokenizer (bits per byte); ± is a 95 % interval over the seeds. `gam compare --split TEXT` has the differences."
    return [Table(columns=["Model", *texts], rows=lines, title="Loss on texts of other kinds", note=note)] if texts else []


INTERVALS = (
    "± is a 95 % interval. That of a loss is over the seeds. That of a difference is the widest over seeds, blocks and documents, and carries Holm's correction "
    "unless the comparison was named before the runs."
)


def finite(group: Sequence[Row]) -> list[Row]:
    """The trainings that did not diverge."""
    return [row for row in group if not diverged(row)]


def seeds(group: Sequence[Row]) -> str:
    """How many trainings there are, and how many of them diverged."""
    left_out = len(group) - len(finite(group))
    return str(len(group)) + (f" ({left_out} diverged)" if left_out else "")


def _insert(columns: list[str], lines: Sequence[list[str]], place: int, name: str, cells: Sequence[str]) -> None:
    columns.insert(place, name)
    for line, cell in zip(lines, cells, strict=True):
        line.insert(place, cell)


FLOOR_CELLS = {
    "Val loss (nats)": ("val_nats_per_token", "{:.4f}"), "PPL": ("val_ppl", "{:,.2f}"), "Bits/byte": ("val_bits_per_byte", "{:.4f}"),
}  # fmt: skip


def floor_cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A floor's cells under ``columns``: its name, and what it has of loss, perplexity and bits per byte."""
    figures = [FLOOR_CELLS[name][1].format(row[FLOOR_CELLS[name][0]]) if name in FLOOR_CELLS else "" for name in columns]
    return [floor_name(row), *figures[1:]]


def quality_table(results: Mapping[str, Any], directory: Path | None = None) -> str:
    """`quality` as Markdown."""
    return quality(results, directory).markdown()


def curves(results: Mapping[str, Any]) -> Table:
    """The validation loss by training tokens, a column per model: what the plot of the loss curves shows."""
    means = {name: common_curve(finite(group)) for name, group in by_variant(trained(results)).items()}
    tokens = sorted({each for curve in means.values() for each in curve})
    lines = [[f"{each:,}", *(f"{summarise(curve[each]).mean:.4f}" if each in curve else "" for curve in means.values())] for each in tokens]
    return Table(columns=["Training tokens", *means], rows=lines, title="Validation loss (nats per token) by training tokens, mean over the seeds")


def context_use(results: Mapping[str, Any]) -> Table:
    """What the text before the last d tokens is worth, a column per model, with the 95 % interval over the targets."""
    groups = {name: [row["context_use"] for row in group if "context_use" in row] for name, group in by_model(results["rows"]).items()}
    groups = {name: group for name, group in groups.items() if group}
    distances = sorted({int(d) for group in groups.values() for each in group for d in each["by_distance"]})
    lines = [[f"{d:,}", *(_gain([each["by_distance"][str(d)] for each in group if str(d) in each["by_distance"]]) for group in groups.values())] for d in distances]
    targets = sorted({each["targets"] for group in groups.values() for each in group})
    note = f"Over {', '.join(f'{n:,}' for n in targets)} fixed targets; the same targets and positions for every d. ± is a 95 % interval over the targets."
    return Table(columns=["True tokens d", *groups], rows=lines, title="Context use: loss with d true tokens over loss with all (nats per token)", note=note)


def _gain(found: Sequence[Mapping[str, float] | None]) -> str:
    """The mean gain over a model's rows."""
    known = [each for each in found if each is not None]
    if not known:
        return _unknown(found)
    gain, half_width = (summarise([each[key] for each in known]).mean for key in ("gain", "half_width"))
    return with_interval(gain, half_width)


def _mean(found: Sequence[float | None]) -> str:
    """The mean loss over a model's rows."""
    known = [each for each in found if each is not None]
    return f"{summarise(known).mean:.4f}" if known else _unknown(found)


def _unknown(found: Sequence[object]) -> str:
    """A cell without a figure: rows were asked for it, whose positions do not reach so far, or none was."""
    return "not measurable" if found else ""


def context_lengths(results: Mapping[str, Any]) -> Table:
    """The loss by context length in evaluation, a column per model."""
    groups = {name: [row["contexts"] for row in group if row.get("contexts")] for name, group in by_model(results["rows"]).items()}
    groups = {name: group for name, group in groups.items() if group}
    lines = []
    for n in sorted({int(each) for group in groups.values() for lengths in group for each in lengths}):
        asked = [[each[str(n)] for each in group if str(n) in each] for group in groups.values()]
        lines.append([f"{n:,}", *(_mean(found) for found in asked)])
    return Table(columns=["Context (tokens)", *groups], rows=lines, title="Loss by context length in evaluation (nats per token)")


def context_table(results: Mapping[str, Any]) -> str:
    """`context_use`, `context_lengths` and `evaluations` as Markdown, each under its title, as far as they were measured."""
    tables = [context_use(results), context_lengths(results), evaluations(results)]
    return "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables if table.rows)


def evaluations(results: Mapping[str, Any]) -> Table:
    """The loss of each evaluated model on its split, with that of the split read as one stream where it was measured."""
    lines = []
    for row in results["rows"]:
        figures = [(row.get(f"{row['split']}_{name}"), form) for name, form in EVALUATED.values()]
        stream = row.get("stream_nats_per_token")
        lines.append([
            row["model"], row["split"], f"{row['context']:,}", *("" if value is None else form.format(value) for value, form in figures),
            "" if stream is None else f"{stream:.4f}",
        ])  # fmt: skip
    return Table(columns=["Model", "Split", "Context", *EVALUATED, "As one stream (nats)"], rows=lines, title="Evaluation", note=provenance(results))


EVALUATED = {
    "Loss (nats)": ("nats_per_token", "{:.4f}"), "PPL": ("ppl", "{:,.2f}"), "Bits/byte": ("bits_per_byte", "{:.4f}"), "Word PPL": ("word_ppl", "{:,.1f}"),
}  # fmt: skip


def provenance(results: Mapping[str, Any]) -> str:
    """One line on the corpus, the machine and what rows say of their models."""
    corpus, machine = results["corpus"], results["environment"]
    words = [f"{corpus['name']} (sha256 {corpus['sha256'][:12]}, {corpus['tokens']:,} training tokens, tokenizer {corpus['tokenizer']})"]
    if rows := [row for row in trained(results) if "train_tokens" in row]:
        words.append(f"{' or '.join(f'{each:,}' for each in sorted({row['train_tokens'] for row in rows}))} tokens trained")
    words.append(f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}")
    return "; ".join(words) + "." + elsewhere(results) + footnotes(results["rows"])


def mean(group: Sequence[Row], key: str, form: str) -> str:
    """The mean of a column over the rows that have it; empty where none has."""
    values = [row[key] for row in group if key in row]
    return form.format(summarise(values).mean) if values else ""


def interval(group: Sequence[Row], key: str, form: str) -> str:
    """The mean of a column, with its 95 % interval where there is more than one row; without a row, every training diverged."""
    if not group:
        return "diverged"
    summary = summarise([row[key] for row in group])
    return form.format(summary.mean) + (f" ± {form.format(summary.half_width)}" if math.isfinite(summary.half_width) else "")
