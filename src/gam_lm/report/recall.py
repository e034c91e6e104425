"""Recall: right answers by number of pairs, by gap and against the state that carries them, from results.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gam_lm.files import write_text
from gam_lm.report.compare import difference_words
from gam_lm.report.plots import colour, label_ends, new_figure, save
from gam_lm.report.rows import Row, by_variant, machine_line
from gam_lm.report.statistics import paired, summarise
from gam_lm.report.tables import Table
from gam_lm.results import read_results

SHORT_GAPS = 0.01
"""The power of the gaps where nothing else is said."""

FILLER = "random"
"""What stands between pairs and questions where nothing else is said."""

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

    def cells(self) -> list[str]:
        """The line's first cells."""
        task = self.task if self.gap_power == SHORT_GAPS else f"{self.task}, gaps^{self.gap_power:g}"
        task += "" if self.filler == FILLER else f", {self.filler} filler"
        return [task, str(self.pairs), f"{self.length:,}", f"{self.sequences:,}" if self.sequences else ""]


SIZE_COLUMNS = ["Task", "Pairs", "Length", "Sequences seen"]


def write_recall(directory: Path) -> str:
    """Write table.md and the plots of a folder's results.json. Returns the tables."""
    results = read_results(directory / "results.json")
    tables = recall_table(results) + "\n" + recall_by_gap(results).markdown()
    write_text(directory / "table.md", tables)
    recall_plots(results, directory)
    return tables


def recall_table(results: Mapping[str, Any]) -> str:
    """:func:`recall` and :func:`recall_by_length` as Markdown."""
    return "\n".join(table.markdown() for table in (recall(results), *recall_by_length(results)))


def recall(results: Mapping[str, Any]) -> Table:
    """Accuracy by task and size, a column per model, with the bytes that each carries from token to token; ± is the 95 % interval over seeds."""

    def cell(rows: list[Row]) -> str:
        summary = summarise([100 * row["accuracy"] for row in rows])
        spread = f" ± {summary.half_width:.1f}" if summary.count > 1 else ""
        return f"{summary.mean:.1f} %{spread} ({rows[0]['state_bytes'] / 1024:,.0f} KiB)"

    models, sizes = _models(results), _by_size(results)
    lines = [size.cells() + [cell(groups[model]) if model in groups else "" for model in models] for size, groups in sizes.items()]
    title = "Recall: right answers (state carried from token to token)"
    return Table(columns=[*SIZE_COLUMNS, *models], rows=lines, title=title, note=machine_line(results))


def recall_differences(results: Mapping[str, Any]) -> Table:
    """How far each model is below the best one of each size, in percentage points, paired by seed."""
    models = _models(results)
    lines = []
    for size, groups in _by_size(results).items():
        best = max(groups, key=lambda model: summarise([row["accuracy"] for row in groups[model]]).mean)
        of_best = {row["seed"]: row["accuracy"] for row in groups[best]}
        cells = size.cells()
        for model in models:
            common = [row for row in groups.get(model, ()) if row["seed"] in of_best]
            if model == best or not common:
                cells.append("best" if model == best else "")
                continue
            cells.append(difference_words(paired([100 * row["accuracy"] for row in common], [100 * of_best[row["seed"]] for row in common]), 1))
        lines.append(cells)
    title = "Recall: percentage points against the best of each line"
    return Table(columns=[*SIZE_COLUMNS, *models], rows=lines, title=title, note="Paired by seed; ± is a 95 % interval.")


def recall_by_gap(results: Mapping[str, Any]) -> Table:
    """Accuracy by the tokens between an answer's binding and its question, in powers of two."""
    lines = _broken_down(results, _by_gap, lambda gap: f"{gap:,} to {2 * gap - 1:,}")
    columns = [*SIZE_COLUMNS, "Gap", *_models(results)]
    return Table(columns=columns, rows=lines, title="Recall: right answers by gap", note="The gap is counted in tokens.")


def recall_by_length(results: Mapping[str, Any]) -> list[Table]:
    """Accuracy at lengths that a model was not trained at, beside that of its training; no table where none was measured."""
    lines = _broken_down(results, _by_length, "{:,}".format)
    note = "Length: tokens of the sequences in training; the gaps of the tested ones are drawn anew, over their own length."
    title = "Recall: right answers at other lengths than in training"
    return [Table(columns=[*SIZE_COLUMNS, "Tested at", *_models(results)], rows=lines, title=title, note=note)] if lines else []


def recall_plots(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Accuracy by pairs, by gap at the greatest length, and against the state. Returns the pictures that the rows allow."""
    sizes = _by_size(results)
    if not sizes:
        return []
    longest = max(size.length for size in sizes)
    at_longest: dict[str, list[Row]] = {}
    by_pairs: dict[str, dict[float, list[float]]] = {}
    by_state: dict[str, dict[float, list[float]]] = {}
    for size, groups in sizes.items():
        for model, rows in groups.items():
            shares = [row["accuracy"] for row in rows]
            by_pairs.setdefault(model, {}).setdefault(size.pairs, []).extend(shares)
            by_state.setdefault(model, {}).setdefault(rows[0]["state_bytes"] / 1024, []).extend(shares)
            if size.length == longest:
                at_longest.setdefault(model, []).extend(rows)
    by_gap: dict[str, dict[float, list[float]]] = {
        model: {gap: [share] for gap, share in parts.items()} for model, rows in at_longest.items() if (parts := _by_gap(rows))
    }
    title = "Recall: " + ", ".join(sorted({size.task for size in sizes}))
    pictures = _plot(by_pairs, "pairs of key and value in a sequence", title, directory / "recall")
    if by_gap:
        pictures += _plot(by_gap, "tokens between the pair and the question", f"{title}, {longest:,} tokens", directory / "recall_gap")
    return pictures + _plot(by_state, "state carried from token to token (KiB)", title, directory / "recall_state", str_of="{:,.0f}".format)


def _plot(
    curves: Mapping[str, Mapping[float, list[float]]], label: str, title: str, stem: Path, *, str_of: Callable[[float], str] = str
) -> list[Path]:
    """Shares in percent, a line per model: the mean at each place, with the range as a band."""
    figure, axes = new_figure()
    ends = []
    for model, points in curves.items():
        places = sorted(points)
        values = [[100 * share for share in points[place]] for place in places]
        means = [float(np.mean(some)) for some in values]
        least, most = [min(some) for some in values], [max(some) for some in values]
        axes.fill_between(places, least, most, color=colour(model), alpha=0.18, linewidth=0)
        axes.vlines(places, least, most, color=colour(model), alpha=0.5, linewidth=2)  # seen where a model has one place only
        axes.plot(places, means, color=colour(model), marker="o", markersize=3.5)
        ends.append((float(places[-1]), means[-1], model, colour(model)))
    axes.set_ylim(-2, 102)
    axes.set_xscale("log", base=2)
    low, high = (bound(place for points in curves.values() for place in points) for bound in (min, max))
    ticks = [place for place in 2.0 ** np.arange(-4, 40) if low / 1.5 <= place <= high * 1.5]
    axes.set_xticks(ticks, [str_of(int(tick) if tick >= 1 else tick) for tick in ticks])
    label_ends(axes, ends)
    axes.set_xlabel(label)
    axes.set_ylabel("right answers (%)")
    axes.set_title(title, loc="left")
    return save(figure, stem)


def _broken_down(results: Mapping[str, Any], shares_of: Callable[[list[Row]], dict[int, float]], name: Callable[[int], str]) -> list[list[str]]:
    """The lines of a table that breaks each size down: one for each key of ``shares_of`` a model's rows, with its ``name``."""
    models, lines = _models(results), []
    for size, groups in _by_size(results).items():
        shares = {model: shares_of(rows) for model, rows in groups.items()}
        for key in sorted({key for each in shares.values() for key in each}):
            figures = [f"{100 * shares[model][key]:.1f} %" if key in shares.get(model, {}) else "" for model in models]
            lines.append([*size.cells(), name(key), *figures])
    return lines


def _by_gap(rows: list[Row]) -> dict[int, float]:
    """The share of right answers from each gap on, to twice that, over all rows."""
    right: dict[int, float] = {}
    asked: dict[int, int] = {}
    for row in rows:
        for part in row.get("by_gap", ()):
            right[part["gap_from"]] = right.get(part["gap_from"], 0.0) + part["accuracy"] * part["answers"]
            asked[part["gap_from"]] = asked.get(part["gap_from"], 0) + part["answers"]
    return {gap: right[gap] / asked[gap] for gap in sorted(asked)}


def _by_length(rows: list[Row]) -> dict[int, float]:
    """The share of right answers at each length tested, the training's among them, as a mean over the rows that were tested elsewhere."""
    shares: dict[int, list[float]] = {}
    for row in rows:
        if "by_length" in row:
            for length, share in [(row["sequence_length"], row["accuracy"]), *((part["length"], part["accuracy"]) for part in row["by_length"])]:
                shares.setdefault(length, []).append(share)
    return {length: float(np.mean(some)) for length, some in shares.items()}


def _models(results: Mapping[str, Any]) -> list[str]:
    """Names of the models: with the fields in which rows of one name differ, as far as the task does not set them."""
    return list(_named(results))


def _by_size(results: Mapping[str, Any]) -> dict[Size, dict[str, list[Row]]]:
    """The rows by size, then by model; sizes in the order in which they first appear."""
    order: dict[Size, dict[str, list[Row]]] = {_size(row): {} for row in results["rows"] if "pairs" in row}
    for model, rows in _named(results).items():
        for row in rows:
            order[_size(row)].setdefault(model, []).append(row)
    return order


def _named(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    return by_variant((row for row in results["rows"] if "pairs" in row), aside=OF_A_TASK)


def _size(row: Row) -> Size:
    budget = row.get("train_config", {})
    sequences = budget.get("steps", 0) * budget.get("batch_size", 0)
    return Size(row["task"], row["pairs"], row["sequence_length"], row.get("gap_power", SHORT_GAPS), row.get("filler", FILLER), sequences)
