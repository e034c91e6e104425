"""The table of exported graphs, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gam_lm.report.rows import machine_line, three_digits
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text


def write_export(directory: Path) -> str:
    """Write table.md of a folder's results.json. Returns the table."""
    table = export_table(read_results(directory / "results.json")).markdown()
    write_text(directory / "table.md", table)
    return table


def export_table(results: Mapping[str, Any]) -> Table:
    """A row for each model and form: seconds of the export, milliseconds of a prompt and of one more token, the difference from PyTorch, the file."""
    rows = sorted(results["rows"], key=lambda row: (row["model"], row["sequence_length"]))
    columns = ["Model", "Form", "Export (s)", "Prompt (ms)", "One token (ms)", "Largest difference", "File (MB)"]
    lines = [
        [
            row["model"], row["variant"], three_digits(row["export_seconds"]), three_digits(row["prompt_ms"]), three_digits(row["step_ms"]),
            f"{row['largest_difference']:.0e}", f"{row['file_mb']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    lengths = sorted({row["sequence_length"] for row in rows})
    note = (
        f"One sequence, a prompt of {' or '.join(f'{n:,}' for n in lengths)} tokens, medians in ONNX Runtime; both forms of a model in one process, in turns. "
        f"The difference is the largest of a logit after the prompt, from PyTorch's. {machine_line(results)}"
    )
    return Table(columns=columns, rows=lines, title="ONNX graphs", note=note)
