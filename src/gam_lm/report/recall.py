"""Recall: right answers by number of pairs, by gap and against the state that carries them, from results.json alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from gam_lm.report.compare import corrected, difference_words
from gam_lm.report.plots import Lines, new_figure, powers_of_two, save
from gam_lm.report.recall_rows import SHORT_GAPS, SIZE_COLUMNS, STOP_EVERY, by_size, diverged_said, models, named_rows, size_of, trials_said
from gam_lm.report.rows import Row, machine_line
from gam_lm.report.statistics import Difference, paired_seeds, summarise
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text

HOW = ("task", "gaps", "filler", "sequences")
"""What was asked and how long it was learned, as far as neither the number of pairs nor the length says it."""


def write_recall(directory: Path) -> str:
    """Write table.md and the plots of a folder's results.json. Returns the tables."""
    results = read_results(directory / "results.json")
    tables = recall_table(results) + "\n" + recall_by_gap(results).markdown()
    write_text(directory / "table.md", tables)
    recall_plots(results, directory)
    return tables


def recall_table(results: Mapping[str, Any]) -> str:
    """`recall`, `recall_steps` and `recall_by_length` as Markdown."""
    return "\n".join(table.markdown() for table in (recall(results), *recall_steps(results), *recall_by_length(results)))


def recall(results: Mapping[str, Any]) -> Table:
    """Accuracy by task and size, a column per model, with the bytes that each carries from token to token; ± is the 95 % interval over seeds."""

    def cell(rows: list[Row]) -> str:
        summary = summarise([100 * row["accuracy"] for row in rows])
        spread = f" ± {summary.half_width:.1f}" if summary.count > 1 else ""
        return f"{summary.mean:.1f} %{spread} ({rows[0]['state_bytes'] / 1024:,.0f} KiB)"

    names, sizes = models(results), by_size(results)
    lines = [size.cells() + [cell(groups[model]) if model in groups else "" for model in names] for size, groups in sizes.items()]
    title = "Recall: right answers (state carried from token to token)"
    return Table(columns=[*SIZE_COLUMNS, *names], rows=lines, title=title, note=machine_line(results) + trials_said(results) + diverged_said(results))


def recall_steps(results: Mapping[str, Any]) -> list[Table]:
    """The steps that each model took to learn its task, where trainings stopped there; no table where none was to."""

    def cell(rows: list[Row], steps: int) -> str:
        learned = [row["learned_at"] for row in rows if "learned_at" in row]
        some = "" if len(learned) == len(rows) else f" ({len(learned)} of {len(rows)} seeds)"
        return f"{np.mean(learned):,.0f}{some}" if learned else f"not in {steps:,}"

    names, lines = models(results), []
    for size, groups in by_size(results).items():
        if size.stop_at:
            steps = {model: max(row.get("train_config", {}).get("steps", 0) for row in rows) for model, rows in groups.items()}
            lines.append([*size.cells(), f"{100 * size.stop_at:g} %", *(cell(groups[model], steps[model]) if model in groups else "" for model in names)])
    note = f"A training looked every {STOP_EVERY} steps, on sequences of its own, and stopped once it was there. Means over the seeds that were."
    return [Table(columns=[*SIZE_COLUMNS, "Until", *names], rows=lines, title="Recall: steps until so many answers were right", note=note)] if lines else []


def recall_differences(results: Mapping[str, Any]) -> Table:
    """How far each model is below the best one of each size, in percentage points, paired by seed."""
    names = models(results)
    lines = []
    for size, groups in by_size(results).items():
        ordered = sorted(groups, key=lambda model: -summarise([row["accuracy"] for row in groups[model]]).mean)
        best = ordered[0] if ordered else ""
        found = {(a, b): each for b, a in combinations(ordered, 2) if (each := _difference(groups[a], groups[b])) is not None}
        known = {a: each for (a, b), each in corrected(found).items() if b == best}
        lines.append(size.cells() + ["best" if model == best else difference_words(known.get(model), 1) for model in names])
    title = "Recall: percentage points against the best of each line"
    note = "Paired by seed; ± is a 95 % interval, with Holm's correction over all pairs of models of a line."
    return Table(columns=[*SIZE_COLUMNS, *names], rows=lines, title=title, note=note)


def _difference(a: list[Row], b: list[Row]) -> Difference | None:
    """The right answers of one model less those of another in percentage points, over the seeds that both have; None where no seed is common."""
    of_a, of_b = ({row["seed"]: 100 * row["accuracy"] for row in rows} for rows in (a, b))
    seeds = sorted(of_a.keys() & of_b.keys())
    return paired_seeds([of_a[seed] for seed in seeds], [of_b[seed] for seed in seeds]) if seeds else None


def recall_by_gap(results: Mapping[str, Any]) -> Table:
    """Accuracy by the tokens between an answer's binding and its question, in powers of two."""
    lines = _broken_down(results, _by_gap, lambda gap: f"{gap:,} to {2 * gap - 1:,}")
    columns = [*SIZE_COLUMNS, "Gap", *models(results)]
    return Table(columns=columns, rows=lines, title="Recall: right answers by gap", note="The gap is counted in tokens.")


def recall_by_length(results: Mapping[str, Any]) -> list[Table]:
    """Accuracy at lengths that a model was not trained at, beside that of its training; no table where none was measured."""
    lines = _broken_down(results, _by_length, "{:,}".format)
    note = "Length: tokens of the sequences in training; the gaps of the tested ones are drawn anew, over their own length."
    title = "Recall: right answers at other lengths than in training"
    return [Table(columns=[*SIZE_COLUMNS, "Tested at", *models(results)], rows=lines, title=title, note=note)] if lines else []


def recall_plots(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Accuracy by pairs, by length, by gap at the greatest length, and against the state where most models answered.

    A line is of one model and one way to ask; its name says what is not as in most rows. Returns the pictures that the rows allow.
    """
    named = named_rows(results)
    if not named:
        return []
    asked = _usual(named)
    title = f"Recall: {asked['task']}, {asked['gaps']}, {asked['filler']}"
    by_pairs = {name: _shares((row["pairs"], row) for row in rows) for name, rows in _lines(named, asked, HOW).items()}
    longest = max(row["sequence_length"] for rows in named.values() for row in rows)
    at_longest = {model: some for model, rows in named.items() if (some := [row for row in rows if row["sequence_length"] == longest])}
    by_gap = {name: gaps for name, rows in _lines(at_longest, _usual(at_longest), (*HOW, "pairs")).items() if (gaps := _by_gap(rows))}
    by_length = _lengths(named, asked)

    pictures = []
    if not by_length or len({pairs for points in by_pairs.values() for pairs in points}) > 1:
        bands = {name: {pairs: (min(shares), max(shares)) for pairs, shares in points.items()} for name, points in by_pairs.items()}
        pictures += _plot(_means(by_pairs), "pairs of key and value in a sequence", title, directory / "recall", bands=bands)
    if by_length:
        pictures += _plot(by_length, "tokens of a sequence", title, directory / "recall_length")
    if by_gap:
        pictures += _plot(by_gap, "tokens between the pair and the question", f"{title}, {longest:,} tokens", directory / "recall_gap")
    size, groups = max(by_size(results).items(), key=lambda item: (len(item[1]), item[0].pairs))
    by_state = _means({model: _shares((row["state_bytes"] / 1024, row) for row in rows) for model, rows in groups.items()})
    title = f"Recall: {size.cells()[0]}, {size.pairs} pairs, {size.length:,} tokens"
    label = "state carried from token to token (KiB)"
    return pictures + _plot(by_state, label, title, directory / "recall_state", joined=False)


def _lengths(named: Mapping[str, list[Row]], asked: Mapping[str, str]) -> dict[str, dict[float, float]]:
    """Accuracy by the length of the sequences: of one training at several, and of trainings at several; no line where there is only one."""
    elsewhere = {model: some for model, rows in named.items() if (some := [row for row in rows if "by_length" in row])}
    at_home = {model: some for model, rows in named.items() if (some := [row for row in rows if "by_length" not in row])}
    lines = {name: _by_length(rows) for name, rows in _lines(elsewhere, asked, (*HOW, "pairs", "length")).items()}
    trained = _means({name: _shares((row["sequence_length"], row) for row in rows) for name, rows in _lines(at_home, asked, (*HOW, "pairs")).items()})
    lines |= {f"{name}, each length trained" if elsewhere else name: points for name, points in trained.items()}
    return {name: points for name, points in lines.items() if len(points) > 1}


def _usual(named: Mapping[str, list[Row]]) -> dict[str, str]:
    """What most rows say of each part of a question."""
    parts = [_parts(row) for rows in named.values() for row in rows]
    return {part: Counter(each[part] for each in parts).most_common(1)[0][0] for part in parts[0]}


def _parts(row: Row) -> dict[str, str]:
    """A question and its budget in words, part by part."""
    size = size_of(row)
    return {
        "task": size.task,
        "gaps": "short gaps" if size.gap_power == SHORT_GAPS else f"gaps^{size.gap_power:g}",
        "filler": f"{size.filler} filler",
        "pairs": f"{size.pairs} pairs",
        "length": f"trained at {size.length:,}",
        "sequences": f"{size.sequences:,} sequences",
    }


def _lines(named: Mapping[str, list[Row]], asked: Mapping[str, str], apart: Iterable[str]) -> dict[str, list[Row]]:
    """The rows of each model, taken ``apart`` by parts of the question; the name says those that are not what is usually ``asked``."""
    lines: dict[str, list[Row]] = {}
    for model, rows in named.items():
        for row in rows:
            other = [said for part, said in _parts(row).items() if part in apart and said != asked[part]]
            lines.setdefault(", ".join([model, *other]), []).append(row)
    return lines


def _shares(places: Iterable[tuple[float, Row]]) -> dict[float, list[float]]:
    """The shares of right answers at each place."""
    shares: dict[float, list[float]] = {}
    for place, row in places:
        shares.setdefault(place, []).append(row["accuracy"])
    return shares


def _means(curves: Mapping[str, Mapping[float, list[float]]]) -> dict[str, dict[float, float]]:
    """The mean at each place of each line."""
    return {name: {place: float(np.mean(shares)) for place, shares in points.items()} for name, points in curves.items()}


def _plot(
    curves: Mapping[str, Mapping[float, float]], label: str, title: str, stem: Path, *,
    bands: Mapping[str, Mapping[float, tuple[float, float]]] | None = None, joined: bool = True,
) -> list[Path]:  # fmt: skip
    """Shares in percent, a line per name."""
    figure, axes = new_figure()
    axes.set_ylim(-2, 102)
    axes.set_yticks(range(0, 101, 20))
    powers_of_two(axes)
    lines = Lines(axes)
    for name, points in curves.items():
        band = {place: (100 * least, 100 * most) for place, (least, most) in bands[name].items()} if bands else None
        lines.add(name, {place: 100 * share for place, share in points.items()}, band=band, joined=joined)
    lines.name()
    axes.set_xlabel(label)
    axes.set_ylabel("right answers (%)")
    axes.set_title(title, loc="left")
    return save(figure, stem)


def _broken_down(results: Mapping[str, Any], shares_of: Callable[[list[Row]], dict[float, float]], name: Callable[[float], str]) -> list[list[str]]:
    """The lines of a table that breaks each size down: one for each key of ``shares_of`` a model's rows, with its ``name``."""
    names, lines = models(results), []
    for size, groups in by_size(results).items():
        shares = {model: shares_of(rows) for model, rows in groups.items()}
        for key in sorted({key for each in shares.values() for key in each}):
            figures = [f"{100 * shares[model][key]:.1f} %" if key in shares.get(model, {}) else "" for model in names]
            lines.append([*size.cells(), name(key), *figures])
    return lines


def _by_gap(rows: list[Row]) -> dict[float, float]:
    """The share of right answers from each gap on, to twice that, over all rows."""
    right: dict[float, float] = {}
    asked: dict[int, int] = {}
    for row in rows:
        for part in row.get("by_gap", ()):
            right[part["gap_from"]] = right.get(part["gap_from"], 0.0) + part["accuracy"] * part["answers"]
            asked[part["gap_from"]] = asked.get(part["gap_from"], 0) + part["answers"]
    return {gap: right[gap] / asked[gap] for gap in sorted(asked) if asked[gap]}


def _by_length(rows: list[Row]) -> dict[float, float]:
    """The share of right answers at each length tested, the training's among them, as a mean over the rows that were tested elsewhere."""
    shares: dict[float, list[float]] = {}
    for row in rows:
        if "by_length" in row:
            for length, share in [(row["sequence_length"], row["accuracy"]), *((part["length"], part["accuracy"]) for part in row["by_length"])]:
                shares.setdefault(length, []).append(share)
    return {length: float(np.mean(some)) for length, some in shares.items()}
