"""How far long work is: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gam_lm.runtime import processes

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

logger = logging.getLogger("gam_lm")

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts the work done; made by `progress`."""

    def __init__(self, description: str, total: int | None, unit: str, done: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self._before = done
        self._started = self._said = time.monotonic()

    def now(self, what: str) -> None:
        """Say what is under way, before it is done."""
        logger.info("%s %d%s: %s", self.description, self.done + 1, f" of {self.total}" if self.total else "", what)

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more, with a word on how it goes."""
        self.done += amount
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            rate = (self.done - self._before) / (now - self._started)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate > 0 else ""
            logger.info(
                "%s: %d%s %s, %.1f/s%s%s",
                self.description,
                self.done,
                f"/{self.total}" if self.total else "",
                self.unit,
                rate,
                left,
                note and ", " + note,
            )


class _Bar(Progress):
    def __init__(self, description: str, total: int | None, unit: str, bars: Bars, done: int = 0) -> None:
        super().__init__(description, total, unit, done)
        self.bars = bars
        self.task = bars.add_task(description, total=total, completed=done, note="", unit=unit)

    def now(self, what: str) -> None:
        self.bars.update(self.task, note=what)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.bars.update(self.task, advance=amount, note=note)


_open: list[Bars] = []
"""The display of the outermost bar; a terminal has one for all."""


@contextmanager
def progress(description: str, total: int | None, unit: str = "steps", *, done: int = 0) -> Iterator[Progress]:
    """Show how far ``total`` pieces of work are; None where their number is not known. Inside another one it shows a second bar below.

    What was ``done`` before, by a run that goes on, counts to the total and not to the rate.

    Only the first process of a distributed run shows anything.
    """
    if processes.rank() or not sys.stderr.isatty():
        yield Progress(description, total, unit, done)
        return
    if _open:
        bar = _Bar(description, total, unit, _open[0], done)
        try:
            yield bar
        finally:
            bar.bars.remove_task(bar.task)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        _open.append(bars)
        try:
            yield _Bar(description, total, unit, bars, done)
        finally:
            _open.remove(bars)
