"""Tables inside a Markdown text, rendered from the results they stand for.

Between ``<!-- table PATH -->`` and ``<!-- end -->`` stands the quality table of the results.json at PATH, relative to the text.
"""

from __future__ import annotations

import re
from pathlib import Path

from gam_lm.errors import InputError
from gam_lm.report.tables import quality_table
from gam_lm.results import read_results

MARKED = re.compile(r"(<!-- table (?P<path>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, directory: Path) -> str:
    """``text`` with every marked table made anew from its results.json below ``directory``. Raises InputError where one is missing."""
    return MARKED.sub(lambda match: match[1] + quality_table(read_results(directory / match["path"])) + match[3], text)


def update(path: Path) -> bool:
    """Render the tables of a file in place; return whether anything changed. Raises InputError for a file that is not there."""
    from gam_lm.files import write_text

    if not path.is_file():
        raise InputError(f"readme is {str(path)!r}: there is no such file")
    before = path.read_text(encoding="utf-8")
    after = render(before, path.parent)
    if after != before:
        write_text(path, after)
    return after != before
