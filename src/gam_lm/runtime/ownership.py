"""One process at a time in a folder, and a word on who it is."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gam_lm.errors import InputError
from gam_lm.runtime.files import TEMPORARY, explained, remove_leftovers, write_text

LOCK, OWNER = ".lock", ".owner.json"


@contextmanager
def owned(folder: Path, flag: str = "out") -> Iterator[None]:
    """Hold ``folder``, which is made where it is missing, against other processes until the block ends. The lock dies with the process, however it ends.

    What killed processes left in it is removed.

    Args:
        folder: to hold.
        flag: what the user calls it, for the error.

    Raises:
        InputError: where another process holds it, with its id, machine and time, or the folder cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{flag} is {str(folder)!r}, which {_holder(folder)} is writing: wait for it or choose another folder") from error
    try:
        remove_leftovers(folder)
        owner = {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(folder / OWNER, json.dumps(owner) + "\n")
        yield
    finally:
        try:
            with explained(folder):
                (folder / OWNER).unlink(missing_ok=True)
        finally:
            lock.release()


def is_bookkeeping(path: Path) -> bool:
    """Whether a file or folder is one that ownership and unfinished writing leave, and nobody's work."""
    return path.name in (LOCK, OWNER) or TEMPORARY.fullmatch(path.name) is not None


def _holder(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['machine']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it holds the lock and has not yet said who it is
        return "another process"
