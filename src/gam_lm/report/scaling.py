"""Table 2 and its two plots, and how steeply each curve rises, from results.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gam_lm.report.plots import Lines, decades, new_figure, powers_of_two, save
from gam_lm.report.rows import by_network, by_setting, machine_line, setting_name, three_digits
from gam_lm.report.statistics import t_quantile
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text

Row = Mapping[str, Any]

FIT_FROM = 1024
"""Shortest sequence of a fit: below it what does not grow with the length counts."""

NEAR, MIDDLE, FAR = 1024, 8192, 65_536
"""The lengths whose times per token are compared, and one between."""


@dataclass(frozen=True)
class Exponent:
    """p of figure ∝ length^p."""

    value: float
    """Slope of the straight line through the logarithms."""
    half_width: float
    """Half its 95 % interval, by Student's t; infinite for two points."""
    points: int
    """Lengths that went into it."""


def fit_exponent(lengths: Sequence[float], figures: Sequence[float]) -> Exponent | None:
    """The exponent by least squares on the logarithms; None for fewer than two different lengths."""
    n = len(lengths)
    if len(set(lengths)) < 2:
        return None
    x, y = [math.log(each) for each in lengths], [math.log(each) for each in figures]
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    spread = math.fsum((each - mean_x) ** 2 for each in x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if n == 2:
        return Exponent(slope, math.inf, n)
    residual = math.fsum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return Exponent(slope, t_quantile(0.975, n - 2) * math.sqrt(residual / (n - 2) / spread), n)


def write_scaling(directory: Path) -> str:
    """Write table.md and the plots of a folder's results.json. Returns the table."""
    results = read_results(directory / "results.json")
    table = scaling_table(results)
    write_text(directory / "table.md", table)
    scaling_plots(results, directory)
    return table


def scaling_table(results: Mapping[str, Any]) -> str:
    """`scaling` as Markdown, each table under its title."""
    return "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in scaling(results))


def scaling(results: Mapping[str, Any]) -> list[Table]:
    """Three tables for each setting.

    Table 2's columns, length by length: milliseconds of a forward and backward pass and MB at the peak; the forward pass alone; the exponents.
    """
    tables = []
    for setting, rows in by_setting(results["rows"]).items():
        name = setting_name(setting)
        tables += [
            _lengths(rows, {"time (ms)": "forward_backward_ms", "memory (MB)": "peak_memory_mb"}, f"Forward and backward pass: {name}", machine_line(results)),
            _lengths(rows, {"": "forward_ms"}, f"Forward pass alone (ms): {name}", machine_line(results)),
            _exponents(rows, f"How steeply time and memory rise: {name}"),
        ]
    return tables


def scaling_brief(results: Mapping[str, Any]) -> str:
    """A row per model, as Markdown: milliseconds per 1,000 tokens at three lengths, the exponents, how far it came. One setting at a time."""
    rows = results["rows"]
    lengths = [T for T in (NEAR, MIDDLE, FAR) if any(row["sequence_length"] == T for row in rows)]
    columns = ["Model", *(f"ms per 1,000 tokens at {T:,}" for T in lengths), "Time ∝ length^p: p", "Memory ∝ length^p: p", "Longest measured"]
    lines = []
    for name, group in by_network(rows).items():
        done = {row["sequence_length"]: row for row in group if row["outcome"] == "ok"}
        fate = {row["sequence_length"]: row["outcome"] for row in group if row["outcome"] != "ok"}
        cells = [three_digits(1000 * done[T]["forward_backward_ms"] / T) if T in done else fate.get(T, "") for T in lengths]
        fits = [exponent_text(list(done.values()), key) for key in ("forward_backward_ms", "peak_memory_mb")]
        lines.append([name, *cells, *fits, f"{max(done):,}" if done else ""])
    settings = " · ".join(setting_name(setting) for setting in by_setting(rows))
    note = f"One block, forward + backward; exponents from {FIT_FROM:,} tokens up; {settings}. {machine_line(results)}"
    return Table(columns=columns, rows=lines, note=note).markdown()


def _lengths(rows: Sequence[Row], keys: Mapping[str, str], title: str, note: str) -> Table:
    """A row per length; a column per model and figure, whose keys in a row stand under what the column's head says of them."""
    models = by_network(rows)
    columns = ["Length", *(f"{name} {what}".strip() for name in models for what in keys)]
    lines = []
    for T in sorted({row["sequence_length"] for row in rows}):
        cells = [f"{T:,}"]
        for group in models.values():
            row = next((row for row in group if row["sequence_length"] == T), None)
            if row is not None and row["outcome"] != "ok":
                cells += [row["outcome"], *[""] * (len(keys) - 1)]
            else:
                cells += [three_digits(row.get(key)) if row else "" for key in keys.values()]
        lines.append(cells)
    return Table(columns=columns, rows=lines, title=title, note=note)


def _exponents(rows: Sequence[Row], title: str) -> Table:
    columns = [
        "Model", "Parameters of the block", "Time ∝ length^p: p", "Memory ∝ length^p: p", f"Time per token, {FAR:,} over {NEAR:,}", "Longest measured",
    ]  # fmt: skip
    lines = []
    for name, group in by_network(rows).items():
        done = [row for row in group if row["outcome"] == "ok"]
        if not done:
            continue
        per_token = {row["sequence_length"]: row["forward_backward_ms"] / row["sequence_length"] for row in done}
        ratio = f"{per_token[FAR] / per_token[NEAR]:.2f}" if {NEAR, FAR} <= per_token.keys() else ""
        lines.append([
            name, f"{done[0]['parameters']:,}", exponent_text(done, "forward_backward_ms"), exponent_text(done, "peak_memory_mb"), ratio,
            f"{max(per_token):,}",
        ])  # fmt: skip
    return Table(columns=columns, rows=lines, title=title, note=f"Exponents are fitted from {FIT_FROM:,} tokens up, with their 95 % interval.")


def exponent_text(rows: Sequence[Row], key: str) -> str:
    """A model's exponent with its interval, or nothing where too few lengths were measured."""
    points = [(row["sequence_length"], row[key]) for row in rows if row["sequence_length"] >= FIT_FROM and row.get(key, 0) > 0]
    fitted = fit_exponent(*zip(*points, strict=True)) if len(points) > 1 else None
    if fitted is None:
        return ""
    return f"{fitted.value:.2f}" + (f" ± {fitted.half_width:.2f}" if fitted.points > 2 else "")


def scaling_plots(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """compute_time and peak_memory on logarithmic axes, a line per model. A folder of several settings gets a pair for each."""
    pictures = []
    settings = by_setting(results["rows"])
    for setting, rows in settings.items():
        ending = "" if len(settings) == 1 else "_" + "_".join(map(str, setting))
        for key, stem, label, title in (
            ("forward_backward_ms", "compute_time", "forward + backward (ms)", "Time of one block"),
            ("peak_memory_mb", "peak_memory", "peak memory (MB)", "Memory of one block"),
        ):
            if any(row.get(key) for row in rows):
                pictures += _plot(rows, key, label, f"{title}, {setting_name(setting)}", directory / (stem + ending))
    return pictures


def _plot(rows: Sequence[Row], key: str, label: str, title: str, stem: Path) -> list[Path]:
    figure, axes = new_figure()
    powers_of_two(axes)
    lines = Lines(axes)
    for name, group in by_network(rows).items():
        points = {row["sequence_length"]: row[key] for row in group if row.get(key)}
        failed = [row for row in group if row["outcome"] != "ok"]
        if points:
            lines.add(name, points, note=f" ({failed[0]['outcome']})" if failed else "")
    decades(axes)
    lines.name()
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left")
    return save(figure, stem)
