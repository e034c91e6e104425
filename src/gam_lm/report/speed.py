"""The table and the plot of training speed, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gam_lm.report.plots import colour, new_figure, save
from gam_lm.report.rows import ERRORS, by_network, errors_of, machine_line, three_digits
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text

Row = Mapping[str, Any]

SHADES = (0.25, 0.45, 0.75, 1.0)
"""Opacity of a model's bars, from the plain step to the compiled one; more than these are spread between the ends."""


def write_speed(directory: Path) -> str:
    """Write table.md and the plot of a folder's results.json. Returns the table."""
    results = read_results(directory / "results.json")
    table = speed_table(results)
    write_text(directory / "table.md", table)
    speed_plot(results, directory / "training_speed")
    return table


def speed_table(results: Mapping[str, Any]) -> str:
    """`speed` as Markdown, each table under its title."""
    return "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in speed(results))


def speed(results: Mapping[str, Any]) -> list[Table]:
    """A table for each batch size, context and width: tokens per second of every model and variant, over its plain ones, operations beside the peak, memory of the step."""
    done = [row for row in results["rows"] if row["outcome"] == "ok"]
    found = {format: [row[f"peak_{format}_flops"] for row in done if f"peak_{format}_flops" in row] for format in ("fp32", "bf16")}
    peaks = [f"{format} {max(each) / 1e9:,.0f} GFLOP/s" for format, each in found.items() if each]
    note = (
        "plain: Conv1d, logits held whole, PyTorch's default AdamW; eager and compiled: this library's step. Operations are counted from the model, three times "
        f"the forward pass. Peak of a matrix product as measured: {', '.join(peaks)}. {machine_line(results)}"
    )
    tables = []
    for (batch, context, width), rows in _comparable(results["rows"]).items():
        mfu = any("mfu" in row for row in rows)
        columns = ["Model", "Parameters", "Step", "Tokens/s", "× plain fp32", "× plain bf16", "GFLOP/s", "Share of the format's peak"]
        exact = any("output_error" in row for row in rows)
        columns += ["MFU"] * mfu + [ERRORS] * exact + ["Memory of a step (MB)", "× plain bf16"]
        lines = []
        for name, group in by_network(rows).items():
            plain = {row["dtype"]: row for row in group if row["variant"] == "plain" and row["outcome"] == "ok"}
            lines += [_cells(name, row, plain, mfu, exact) for row in group]
        tables.append(Table(columns=columns, rows=lines, title=f"batch {batch}, context {context:,}, width {width}", note=note))
    return tables


def _cells(name: str, row: Row, plain: Mapping[str, Row], mfu: bool, exact: bool) -> list[str]:
    head = [name, f"{row['parameters']:,}" if "parameters" in row else "", _step(row)]
    if row["outcome"] != "ok":
        return [*head, row["outcome"], *[""] * (6 + mfu + exact)]
    times = [f"{row['tokens_per_second'] / plain[dtype]['tokens_per_second']:.2f}" if dtype in plain else "" for dtype in ("fp32", "bf16")]
    both = plain.get("bf16", {}).get("peak_memory_mb") and "peak_memory_mb" in row
    return [
        *head, f"{row['tokens_per_second']:,.0f}", *times, f"{row['flops_per_second'] / 1e9:,.0f}", f"{100 * row['share_of_peak']:.0f} %",
        *([f"{100 * row['mfu']:.0f} %" if "mfu" in row else ""] * mfu), *([errors_of(row)] * exact),
        three_digits(row.get("peak_memory_mb")), f"{row['peak_memory_mb'] / plain['bf16']['peak_memory_mb']:.2f}" if both else "",
    ]  # fmt: skip


def speed_plot(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Tokens per second at the largest batch, a bar for each variant. Returns the SVG and the PNG."""
    (batch, context, _), rows = max(_comparable(results["rows"]).items())
    rows = [row for row in rows if row["outcome"] == "ok"]
    figure, axes = new_figure(max(2.5, 0.6 + 0.26 * len(rows)))
    place, names = 0.0, []
    for name, group in by_network(rows).items():
        for row, shade in zip(group, _shades(len(group)), strict=True):
            axes.barh(place, row["tokens_per_second"], height=0.85, color=colour(name), alpha=shade)
            axes.text(row["tokens_per_second"], place, f" {row['tokens_per_second']:,.0f}", va="center", fontsize=8)
            names.append((place, f"{name}, {_step(row)}"))
            place -= 1
        place -= 0.5
    axes.set_yticks([at for at, _ in names], [text for _, text in names], fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_xlabel("training tokens per second")
    axes.set_title(f"Whole training steps, batch {batch}, context {context:,}", loc="left")
    return save(figure, stem)


def _shades(count: int) -> Sequence[float]:
    return SHADES[-count:] if count <= len(SHADES) else [float(each) for each in np.linspace(SHADES[0], SHADES[-1], count)]


def _step(row: Row) -> str:
    return f"{row['variant']} {row['dtype']}"


def _comparable(rows: Sequence[Row]) -> dict[tuple[int, int, int], list[Row]]:
    """Rows by batch size, context and width."""
    found: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["batch_size"], row["context"], row["model_config"]["hidden_size"]), []).append(row)
    return found
