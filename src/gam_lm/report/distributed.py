"""The table of `gam bench-distributed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gam_lm.results import read_results
from gam_lm.runtime.files import write_text


def distributed_table(results: dict[str, object]) -> str:
    """Markdown of the content of a results.json: differences to one process, memory, speeds, faults, and the cost of saving."""
    rows: list[dict[str, Any]] = list(results["rows"])  # type: ignore[call-overload]
    lines = ["| Model | Numbers | Run | Weights, relative | Validation (nats) | Training (nats) | Tokens missed |", "|:--|:--|:--|--:|--:|--:|--:|"]
    for row in rows:
        if "weights_relative_difference" in row:
            figures = (f"{row[key]:.1e}" for key in ("weights_relative_difference", "validation_difference_nats", "training_difference_nats"))
            lines.append(f"| {row['model']} | {row['dtype']} | {row['variant']} | {' | '.join(figures)} | {row['tokens_missed']} |")
    if any("memory_ratio" in row for row in rows):
        lines += ["", "| Model | Run | Memory of a process (MB) | Expected (MB) | Ratio |", "|:--|:--|--:|--:|--:|"]
    for row in rows:
        if "memory_ratio" in row:
            expected = row.get("expected_memory_mb", row.get("piece_alone_mb"))
            lines.append(f"| {row['model']} | {row['variant']} | {row['peak_memory_mb']:,.0f} | {expected:,.0f} | {row['memory_ratio']:.2f} |")
    lines += ["", "| Model | Processes | Threads each | Tokens a second | Load of the machine |", "|:--|--:|--:|--:|--:|"]
    for row in rows:
        if "tokens_per_second" in row:
            lines.append(f"| {row['model']} | {row['processes']} | {row['threads']} | {row['tokens_per_second']:,.0f} | {row['load_average']:.1f} |")
    return "\n".join(lines + _faults(rows) + _saves(rows)) + "\n"


def _faults(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "| Model | Fault, two processes | Seconds to the end | Exit status | Names the process | Weights | Losses (nats) |", "|:--|:--|--:|--:|:--|--:|--:|"]
    found = [row for row in rows if "seconds_to_end" in row]
    for row in found:
        differences = f"{row['weights_difference']:.1e} | {row['losses_difference_nats']:.1e}"
        named = "yes" if row["names_process"] else "no" if row["signal"] == "SIGKILL" else "none died"
        lines.append(f"| {row['model']} | {row['variant'].removeprefix('fault: ')} | {row['seconds_to_end']:.1f} | {row['exit_status']} | {named} | {differences} |")
    return lines if found else []


def _saves(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "| Model | Run | Step with states (ms) | Without (ms) | Ratio | Least to largest |", "|:--|:--|--:|--:|--:|--:|"]
    found = [row for row in rows if "saving_ratio" in row]
    for row in found:
        steps = f"{row['step_ms_with_states']:.1f} | {row['step_ms_without_states']:.1f}"
        spread = f"{row['saving_ratio_least']:.2f} to {row['saving_ratio_largest']:.2f}"
        lines.append(f"| {row['model']} | {row['variant']} | {steps} | {row['saving_ratio']:.2f} | {spread} |")
    return lines if found else []


def write_distributed(out: Path) -> str:
    """Write table.md of the results.json in ``out``. Returns the table."""
    table = distributed_table(read_results(out / "results.json"))
    write_text(out / "table.md", table)
    return table
