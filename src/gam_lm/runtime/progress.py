"""How far long work is: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gam_lm.runtime import processes

logger = logging.getLogger("gam_lm")

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts the work done; made by `progress`."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._bar: object | None = None
        self._started = self._said = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more, with a word on how it goes."""
        self.done += amount
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            rate = self.done / (now - self._started)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total else ""
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
    def __init__(self, description: str, total: int | None, unit: str, bars: object) -> None:
        super().__init__(description, total, unit)
        self._bars = bars
        self._task = bars.add_task(description, total=total, note="")  # type: ignore[attr-defined]

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self._bars.update(self._task, advance=amount, note=note)  # type: ignore[attr-defined]


@contextmanager
def progress(description: str, total: int | None, unit: str = "steps") -> Iterator[Progress]:
    """Show how far ``total`` pieces of work are; None where their number is not known.

    Only the first process of a distributed run shows anything.
    """
    if processes.rank() or not sys.stderr.isatty():
        yield Progress(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(description, total, unit, bars)
