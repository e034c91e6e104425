"""What people see: tables aligned on a terminal, Markdown in a pipe, and characters that every console has."""

from __future__ import annotations

import codecs
import html
import io
import logging
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

READABLE = {"−": "-", "–": "-", "×": "x", "·": "*", "…": "...", "→": "->", "±": "+-", "≤": "<=", "≥": ">=", "∝": "~", "‖": "||"}
"""What stands for characters that a console's encoding lacks; others become an escape, such as \\u2211."""

GAP = 2
"""Columns between two cells."""

PROSE = 30
"""Characters from which a cell is broken into lines where the terminal is too narrow."""


def show_anything() -> None:
    """Let printing never fail, whatever the terminal's encoding lacks."""
    codecs.register_error("readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="readable")


def _readable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(READABLE.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lacking), error.end


def readable(text: str, stream: TextIO | None = None) -> str:
    """The text as ``stream``, by default standard output, is going to show it, so that its width is known."""
    codecs.register_error("readable", _readable)
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "readable").decode(encoding)


class StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is now: a progress bar takes its place for a while, so that a line goes above the bar. A plain line that came already
    is left out: what holds for all models is said once.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        line = record.getMessage()
        if record.levelno <= logging.INFO:
            if line in self.said:
                return
            self.said.add(line)
        super().emit(record)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Standard error."""
        return sys.stderr


def standard_output() -> Console:
    """Standard output for rich. A reader that leaves is the end of the command, as it is for what is printed plainly."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1
            raise BrokenPipeError

    return Output(highlight=False)


def show(markdown: str) -> None:
    """Print Markdown: as it is into a pipe, with aligned tables on a terminal. There, what is the same in all rows is said once, below."""
    if not sys.stdout.isatty():
        print(markdown)
        return
    from rich.text import Text

    console = standard_output()
    lines = readable(markdown).split("\n")
    while lines:
        if lines[0].startswith("|") and len(lines) > 1 and re.fullmatch(r"\|[-:|]+\|", lines[1]):
            end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
            _show_table(console, [_cells(line) for line in lines[:end] if line != lines[1]], [cell.endswith(":") for cell in _cells(lines[1])])
            lines = lines[end:]
            continue
        line = lines.pop(0)
        console.print(Text(html.unescape(line.lstrip("# ") if line.startswith("#") else line), "bold" if line.startswith("#") else ""))


def _cells(line: str) -> list[str]:
    return [html.unescape(cell.strip().replace("\\|", "|")) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _show_table(console: Console, rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    head, *body = rows
    same = _same(body)
    columns = [i for i in range(len(head)) if i not in same]
    cells = {i: [row[i].strip("*") for row in body] for i in columns}
    least = {i: _least_width(head[i], cells[i]) for i in columns}
    for part in _parts(columns, least, console.width):
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        room = console.width - sum(least[i] + GAP for i in part)
        for i in part:
            more = min(room, max(map(len, cells[i]), default=0) - least[i]) if least[i] >= PROSE else 0
            room -= max(0, more)
            table.add_column(Text(head[i]), justify="right" if right[i] else "left", width=least[i] + max(0, more), overflow="fold")
        for row in body:
            table.add_row(*(_styled(row[i]) for i in part))
        console.print(table)
        console.print()
    if same:
        console.print(Text("The same for all: " + ", ".join(f"{head[i]} {body[0][i]}" for i in same) + "."))


def _styled(cell: str) -> Text:
    """A cell without the asterisks of Markdown."""
    from rich.text import Text

    found = re.fullmatch(r"(\*{0,2})(.*?)\1", cell, re.DOTALL)
    assert found is not None
    return Text(found[2], {"": "", "*": "italic", "**": "bold"}[found[1]])


def _same(body: Sequence[Sequence[str]]) -> list[int]:
    """Columns of figures that are the same in every row; rows of what takes no model, in italics, have to be empty there."""
    models = [row for row in body if not row[0].startswith("*") or row[0].startswith("**")]
    others = [row for row in body if row not in models]
    if len(models) < 2:
        return []
    columns = range(1, len(models[0]))
    found = [i for i in columns if models[0][i] and len({row[i] for row in models}) == 1 and not any(row[i] for row in others)]
    return found if len(found) < len(columns) else []


def _least_width(head: str, cells: Sequence[str]) -> int:
    """Columns that no figure is broken in: words of a heading and of long cells may go on new lines."""
    words = [word for cell in cells if len(cell) > PROSE for word in cell.split()]
    whole = [cell for cell in cells if len(cell) <= PROSE]
    return max(map(len, (*head.split(), *words, *whole, *([" " * PROSE] if words else []))), default=1)


def _parts(columns: Sequence[int], widths: dict[int, int], wide: int) -> list[list[int]]:
    """The columns in tables that fit into ``wide``; each begins with the first column."""
    first, *rest = columns
    parts, used = [[first]], widths[first] + GAP
    for i in rest:
        if used + GAP + widths[i] > wide and len(parts[-1]) > 1:
            parts, used = [*parts, [first]], widths[first] + GAP
        parts[-1].append(i)
        used += GAP + widths[i]
    return parts
