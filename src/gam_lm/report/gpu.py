"""One page for all that was measured on a GPU, from the results.json of each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gam_lm.report.decode import decode_table, write_decode
from gam_lm.report.rows import errors_of, machine_line, three_digits
from gam_lm.report.scaling import scaling_table, write_scaling
from gam_lm.report.speed import speed_table, write_speed
from gam_lm.report.tables import Table, quality_table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text

NOT_MEASURED = "No figure of a GPU is given here: none has a committed row. An H200 was measured by hand for two minutes, with good and bad figures (see the log).\n"
"""What a page says until there are results."""

PARTS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "parity": ("Parity with the fp64 reference", lambda results: parity_table(results)),
    "table-2": ("Table 2: one block", scaling_table),
    "blocks": ("Blocks at equally many tokens", lambda results: blocks_table(results)),
    "training": ("Training", speed_table),
    "decode": ("Decoding", decode_table),
    "train": ("A real training", lambda results: quality_table(results)),
}
"""By folder: the title of a part, and its table."""

DRAWN: Mapping[str, Callable[[Path], object]] = {"table-2": write_scaling, "training": write_speed, "decode": write_decode}
"""Parts that have a page and plots of their own."""


def write_gpu(directory: Path) -> str:
    """Write table.md of ``directory``, and tables and plots of its parts. Returns the table; empty where nothing was measured."""
    for folder, write in DRAWN.items():
        if folder in _measured(directory):
            write(directory / folder)
    table = "" if not _measured(directory) else gpu_tables(directory)
    write_text(directory / "table.md", table)
    return table


def gpu_tables(directory: Path, *, brief: bool = False) -> str:
    """The tables of every part of ``directory`` that was measured, each under its title, or if ``brief`` of the blocks; `NOT_MEASURED` where none was."""
    found = {folder: results for folder, results in _measured(directory).items() if folder == "blocks" or not brief}
    return "\n".join(f"## {PARTS[folder][0]}\n\n{PARTS[folder][1](results)}" for folder, results in found.items()) or NOT_MEASURED


def _measured(directory: Path) -> dict[str, Mapping[str, Any]]:
    paths = {folder: directory / folder / "results.json" for folder in PARTS}
    read = {folder: read_results(path) for folder, path in paths.items() if path.is_file()}
    return {folder: results for folder, results in read.items() if results["rows"]}


def blocks_table(results: Mapping[str, Any]) -> str:
    """Time per 1,000 tokens of a forward and backward pass at each length, with the largest errors of outputs and state beside it; the fastest in bold."""
    lengths = sorted({row["sequence_length"] for row in results["rows"]})
    done = {(row["model"], row["sequence_length"]): row for row in results["rows"]}

    def per_thousand(row: Mapping[str, Any]) -> float:
        return float(1000 * row["forward_backward_ms"] / (row["batch_size"] * row["sequence_length"]))

    best = {T: min((per_thousand(row) for (_, at), row in done.items() if at == T and row["outcome"] == "ok"), default=None) for T in lengths}

    def cell(row: Mapping[str, Any] | None, T: int) -> str:
        if row is None:
            return ""
        if row["outcome"] != "ok":
            return str(row["outcome"])
        time = three_digits(per_thousand(row))
        errors = errors_of(row)
        return (f"**{time}**" if per_thousand(row) == best[T] else time) + (f" ({errors})" if errors else "")

    rows = [[name, *(cell(done.get((name, T)), T) for T in lengths)] for name in dict.fromkeys(row["model"] for row in results["rows"])]
    counts = sorted({row["batch_size"] * row["sequence_length"] for row in results["rows"]})
    note = (
        f"Milliseconds per 1,000 tokens, forward + backward, {results['rows'][0]['dtype']} autocast, {counts[-1]:,} tokens in a pass. In brackets the largest error against "
        f"float64 of the outputs and of the state, each over the largest value; of long sequences the first tokens are compared. {machine_line(results)}"
    )
    return Table(columns=["Model", *(f"{T:,} tokens" for T in lengths)], rows=rows, note=note).markdown()


def parity_table(results: Mapping[str, Any]) -> str:
    """The error of each path beside the plain one's."""
    lines = [
        "| Model | Path | Error of the logits | Plain path | Error of the gradient | Plain path | Within twice the plain |", "|---|---|" + "--:|" * 4 + "---|",
    ]  # fmt: skip
    for row in results["rows"]:
        keys = ("logits_error", "plain_logits_error", "gradient_error", "plain_gradient_error")
        errors = [f"{row[key]:.1e}" if key in row else "" for key in keys]
        cells = [row["model"], f"{row['variant']} {row['dtype']}, {row['backend']}", *errors, "yes" if row["within"] else "**no**"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Errors are ‖x − x₆₄‖ / ‖x₆₄‖. {machine_line(results)}", ""])
