"""One page for all that was measured on a GPU, from the results.json of each part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gam_lm.report.decode import write_decode
from gam_lm.report.rows import machine_line
from gam_lm.report.scaling import write_scaling
from gam_lm.report.speed import write_speed
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text


def write_gpu(directory: Path) -> str:
    """Write table.md of ``directory``, and tables and plots of its parts. Returns the table."""
    parts = []
    for title, folder, write in (
        ("Parity with the fp64 reference", "parity", lambda path: parity_table(read_results(path / "results.json"))),
        ("Table 2: one block", "table-2", write_scaling),
        ("Training", "training", write_speed),
        ("Decoding", "decode", write_decode),
    ):
        path = directory / folder / "results.json"
        if path.is_file() and read_results(path)["rows"]:
            parts.append(f"## {title}\n\n{write(directory / folder)}")
    table = "\n".join(parts)
    write_text(directory / "table.md", table)
    return table


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
