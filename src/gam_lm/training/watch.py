"""Processes of a run that watch each other, so that one that dies ends the job with one line that names it.

Each process counts seconds in the store through which the launcher joined them. One whose count stands still is dead, or its machine is: after
``SILENCE`` counts of the others, or after ``PATIENCE`` where a connection has broken and only the name is missing. Counts are compared with counts, not with
a clock, so that a machine that slept has lost nobody.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from gam_lm.errors import InputError
from gam_lm.training.distributed import World

logger = logging.getLogger("gam_lm")

BEAT = 1.0
"""Seconds between two counts."""

LOST = " lost"
"""Follows the count of a process that has met a broken connection, for all to look closely."""

PATIENCE = 6
SILENCE = 40

BROKEN = ("connection", "gloo", "nccl", "socket", "peer", "store")
"""Words by which an error of torch.distributed may be known: most are plain RuntimeErrors."""


@contextmanager
def watched(world: World) -> Iterator[None]:
    """Within the block a process that dies ends the others with exit code 1; the first that lives says which one it was."""
    if world.size == 1 or world.store is None:
        yield
        return
    watch = _Watch(world)
    watch.start()

    def stopped(number: int, frame: object) -> None:
        """A launcher ends the others when one has died, perhaps before it was found which."""
        watch.look()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, stopped)
    try:
        yield
    except (RuntimeError, InputError) as error:
        if any(word in str(error).lower() for word in BROKEN):
            watch.look()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        watch.ended.set()
        watch.join()


class _Watch(threading.Thread):
    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self.lost, self.ended = threading.Event(), threading.Event()
        self._world, self._store = world, world.store.clone()
        job = world.gather(uuid.uuid4().hex)[0]  # the store may still hold the counts of a job that died
        self._keys = [f"gam-alive-{job}-{rank}" for rank in range(world.size)]
        self._store.set(self._keys[world.rank], "0")
        self._store.wait(self._keys)

    def look(self) -> None:
        """Wait until it must be clear whether another is dead: then the process ends in here."""
        self.lost.set()
        self.join((PATIENCE + 4) * BEAT)

    def run(self) -> None:
        """Count and look until the block ends, or somebody is dead."""
        own, seen, still = 0, [b""] * self._world.size, [0] * self._world.size
        while not self.ended.wait(BEAT):
            own += 1
            try:
                self._store.set(self._keys[self._world.rank], f"{own}{LOST if self.lost.is_set() else ''}")
                counts = self._store.multi_get(self._keys)
            except RuntimeError:  # the first process keeps the store, unless the launcher does
                self._end([0])
            still = [0 if count != before or count == b"ended" else number + 1 for count, before, number in zip(counts, seen, still, strict=True)]
            seen = counts
            patience = PATIENCE if any(LOST.encode() in count for count in counts) else SILENCE
            dead = [rank for rank, number in enumerate(still) if number >= patience]
            if dead:
                self._end(dead)
        with suppress(RuntimeError):  # whoever keeps the store has ended before: nobody is left to be told
            self._store.set(self._keys[self._world.rank], "ended")

    def _end(self, dead: list[int]) -> NoReturn:
        if self._world.rank == min({*range(self._world.size)} - {*dead}):
            names = f"process {dead[0]}" if len(dead) == 1 else f"processes {', '.join(map(str, dead))}"
            logger.error("gam: %s of %d died; the same command goes on from the last state", names, self._world.size)
        os._exit(1)  # no exception reaches a main thread that waits for the dead
