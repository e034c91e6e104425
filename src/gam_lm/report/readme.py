"""Tables inside a Markdown text, rendered from the results they stand for.

Between ``<!-- table PATH -->`` and ``<!-- end -->`` stands the table of the results.json at PATH, relative to the text. Behind the path, words choose:
``batch_size=1 dtype=bf16`` keeps the rows with these values, ``brief`` takes the short form of a scaling analysis.

Between ``<!-- gpu PATH -->`` and ``<!-- end -->`` stand the tables of what `gam bench-gpu` wrote to PATH (``brief``: of the blocks alone), or that no row is of a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gam_lm.errors import InputError
from gam_lm.report.decode import decode_table
from gam_lm.report.gpu import gpu_tables
from gam_lm.report.recall import recall_table
from gam_lm.report.scaling import scaling_brief, scaling_table
from gam_lm.report.speed import speed_table
from gam_lm.report.tables import context_table, quality_table
from gam_lm.report.tune import study_table
from gam_lm.results import read_results

MARKED = re.compile(r"(<!-- table (?P<path>\S+)(?P<words>(?: \S+)*?) -->\n).*?(<!-- end -->)", re.DOTALL)

GPU = re.compile(r"(<!-- gpu (?P<path>\S+)(?P<brief> brief)? -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "scale": scaling_table, "bench-decode": decode_table, "bench-train": speed_table, "recall": recall_table, "eval": context_table,
    "tune": lambda results: study_table(results).markdown(),
}  # fmt: skip
"""By the verb that measured; of any other, the quality table."""


def render(text: str, directory: Path) -> str:
    """``text`` with every marked table made anew from its results.json below ``directory``. Raises InputError where one is missing, or words choose nothing."""
    text = GPU.sub(lambda match: match[1] + gpu_tables(directory / match["path"], brief=bool(match["brief"])) + match[4], text)
    return MARKED.sub(lambda match: match[1] + _table(directory / match["path"], match["words"].split()) + match[4], text)


def _table(path: Path, words: list[str]) -> str:
    results = read_results(path)
    wanted = dict(word.split("=", 1) for word in words if word != "brief")
    rows = [row for row in results["rows"] if all(str(row.get(key)) == value for key, value in wanted.items())]
    if wanted and not rows:
        raise InputError(f"{path} has no rows with {' '.join(words)}: choose others in the mark of the table")
    verb = results["command"].split()[1] if " " in results["command"] else ""
    shown = results | {"rows": rows}
    if "brief" in words:
        return scaling_brief(shown)
    return TABLES[verb](shown) if verb in TABLES else quality_table(shown, path.parent)


def update(path: Path) -> bool:
    """Render the tables of a file in place; return whether anything changed. Raises InputError for a file that is not there."""
    from gam_lm.runtime.files import write_text

    if not path.is_file():
        raise InputError(f"readme is {str(path)!r}: there is no such file")
    before = path.read_text(encoding="utf-8")
    after = render(before, path.parent)
    if after != before:
        write_text(path, after)
    return after != before
