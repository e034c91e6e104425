"""Several processes of one command on one machine, which share its work through the results folder. Imports no torch."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from gam_lm.errors import InputError
from gam_lm.runtime.files import explained

logger = logging.getLogger("gam_lm")

VARIABLE = "GAM_LM_WORKER"
"""The environment variable that tells a process that it is a worker: its number, from 1."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_worker() -> bool:
    """Whether this process was started by `fan_out`."""
    return VARIABLE in os.environ


def fan_out(count: int, folder: Path, *, gpus: Sequence[str] = (), go_on: Callable[[], None] = lambda: None) -> None:
    """Run this command in ``count`` workers and wait for them; each takes what no other has claimed. Their words go to ``folder``/workers.

    Args:
        count: number of workers.
        folder: of the results.
        gpus: names of GPUs, dealt out in turn; without them the cores are shared out.
        go_on: called every second.

    Raises:
        InputError: for a count that is no number of workers.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the workers have stopped.
    """
    if count < 1:
        raise InputError(f"workers is {count}: use a whole number of at least 1")
    logs = [folder / "workers" / f"{number}.log" for number in range(1, count + 1)]
    logger.info("%d workers; what they say: %s", count, logs[0].parent)
    with explained(folder), ExitStack() as held, _stoppable():
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        workers = []
        try:
            for number, log in enumerate(logs, 1):
                file = held.enter_context(log.open("w", encoding="utf-8"))
                command = [sys.executable, "-m", "gam_lm", *sys.argv[1:]]
                workers.append(subprocess.Popen(command, env=_environment(number, count, gpus), stdin=subprocess.DEVNULL, stdout=file, stderr=file))
            while any(worker.poll() is None for worker in workers):
                time.sleep(1)
                go_on()
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            for worker in workers:
                worker.wait()
    for worker, log in zip(workers, logs, strict=True):
        if worker.returncode:
            said = log.read_text(encoding="utf-8").splitlines() or ["nothing"]
            logger.warning("worker %s ended with exit code %d (%s); its rows are done here", log.stem, worker.returncode, said[-1])


@contextmanager
def claimed(folder: Path, label: str) -> Iterator[bool]:
    """Hold the work called ``label`` against other processes; False where another one does it. The claim dies with the process."""
    with explained(folder):
        (folder / ".claims").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".claims" / label)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
    try:
        yield True
    finally:
        lock.release()


def _environment(number: int, count: int, gpus: Sequence[str]) -> dict[str, str]:
    own = {VARIABLE: str(number), "OMP_NUM_THREADS": str(max(1, CORES // count))}
    if gpus:
        own["CUDA_VISIBLE_DEVICES"] = gpus[(number - 1) % len(gpus)]
    return os.environ | own


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as SIGINT does, so that no worker outlives its parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
