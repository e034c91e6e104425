"""Ctrl-C and SIGTERM take effect between two steps, so that a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Abandoned(Exception):
    """A validation was given up because the run is to stop; it is made again when the run goes on."""


class Interruption:
    """Whether the run is to stop."""

    def __init__(self) -> None:
        self.requested = False

    def check(self, done: int = 0) -> None:
        """Raise `Abandoned` where the run is to stop: for work that is repeated as a whole."""
        if self.requested:
            raise Abandoned


@contextmanager
def signals_held() -> Iterator[Interruption]:
    """Within the block SIGINT and SIGTERM only ask to stop. A second SIGINT acts at once: what is on the disk stays good.

    A request that nobody answered within the block is raised as KeyboardInterrupt at its end. Outside the main thread nothing is held.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if interruption.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.requested = True

    for held in (signal.SIGINT, signal.SIGTERM):
        before[held] = signal.signal(held, ask)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if interruption.requested:
        raise KeyboardInterrupt
