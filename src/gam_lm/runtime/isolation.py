"""Run one measurement in a process of its own, within a memory and a time limit: running out of either is a result, never the end of the run.

The parent starts ``python -m gam_lm.runtime.isolation module:function``, gives the parameters as JSON, watches the memory and takes the figures as JSON. The
function is ``function(parameters, peak) -> figures``: ``peak(step)`` calls ``step`` and returns the bytes by which the process grew at most, as the
parent saw it. Imports no torch.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from gam_lm.errors import InputError
from gam_lm.runtime.allocator import give_back, keep_freed_memory
from gam_lm.runtime.imports import load_imports

OK, OUT_OF_MEMORY, OVER_TIME = "ok", "out of memory", "over time"

POLL_SECONDS = 0.005
PARENT_SECONDS = 0.5
START_SECONDS = 180.0
"""The most that starting Python and importing torch may take, which no limit counts."""

CONTROL_GROUP = Path("/sys/fs/cgroup")

SHARE_OF_MEMORY = 0.8
"""Of what is available, for a process whose limit is not given."""

Peak = Callable[[Callable[[], object]], "int | None"]
"""Calls a step; the bytes by which the process grew at most meanwhile, None where the system does not tell."""


@dataclass(frozen=True)
class Isolated:
    """What came of a measurement."""

    outcome: str
    """ok, out of memory, or over time."""
    figures: Mapping[str, Any]
    """What the function returned; empty unless ok."""


def run_isolated(function: str, parameters: Mapping[str, Any], *, seconds: float, memory_mb: float, keep_memory: bool = False) -> Isolated:
    """Call ``function`` in a new process.

    Args:
        function: ``module:name``.
        parameters: JSON values.
        seconds: the most that the function may take; starting the process does not count.
        memory_mb: the most resident memory of the process, in 2²⁰ bytes.
        keep_memory: whether the process keeps what it frees, as the verbs of ``gam`` do: quicker, and larger by what does not fit together.

    Raises:
        InputError: where the function raises one.
        RuntimeError: where it fails in another way; its traceback is on the standard error.
    """
    command = [sys.executable, "-m", "gam_lm.runtime.isolation", function, *(["keep"] if keep_memory else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        return _Watch(process, seconds, memory_mb * 2**20).follow(parameters)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def measured(
    function: Callable[[Mapping[str, Any], Peak], Mapping[str, Any]], parameters: Mapping[str, Any], *, isolated: bool, seconds: float, memory_mb: float | None
) -> Isolated:
    """Call ``function`` in a new process, or within this one.

    Args:
        function: of a module, ``function(parameters, peak) -> figures``.
        parameters: JSON values.
        isolated: False is quicker where the device itself survives running out of memory; nothing is limited then, and ``peak`` knows nothing.
        seconds: the most that a process may take.
        memory_mb: the most resident memory of a process; None is 80 % of what is available.
    """
    if isolated:
        limit = SHARE_OF_MEMORY * available_mb() if memory_mb is None else memory_mb
        return run_isolated(f"{function.__module__}:{function.__name__}", parameters, seconds=seconds, memory_mb=limit, keep_memory=True)

    def unwatched(step: Callable[[], object]) -> None:
        step()

    gc.collect()  # what was measured before may hold on to itself
    try:
        return Isolated(OK, function(parameters, unwatched))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return Isolated(OUT_OF_MEMORY, {})


class _Watch:
    """The parent's side."""

    def __init__(self, process: subprocess.Popen[str], seconds: float, memory: float) -> None:
        self.process, self.seconds, self.memory = process, seconds, memory
        assert process.stdin is not None and process.stdout is not None
        self.stdin: IO[str] = process.stdin
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()
        self.base = self.highest = 0
        self.exact = False

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self.lines.put(line)
        self.lines.put(None)

    def follow(self, parameters: Mapping[str, Any]) -> Isolated:
        self._say(parameters)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                line = self.lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                used = resident_bytes(self.process.pid)
                self.highest = max(self.highest, used or 0)
                if used is not None and used > self.memory:
                    return Isolated(OUT_OF_MEMORY, {})
                if time.monotonic() > deadline:
                    return Isolated(OVER_TIME, {})
                continue
            if line is None:
                return self._ended()
            said = json.loads(line)
            match said["event"]:
                case "started":
                    deadline = time.monotonic() + self.seconds
                case "watch":
                    self.exact = reset_high_water(self.process.pid)
                    self.base = self.highest = resident_bytes(self.process.pid) or 0
                    self._say({})
                case "watched":
                    if self.exact:
                        self.highest = max(self.highest, high_water(self.process.pid))
                    self._say({"bytes": self.highest - self.base if self.base else None})
                case "done":
                    return Isolated(OK, said["figures"])
                case "out of memory":
                    return Isolated(OUT_OF_MEMORY, {})
                case "input":
                    raise InputError(said["message"])

    def _say(self, message: Mapping[str, Any]) -> None:
        try:
            self.stdin.write(json.dumps(message) + "\n")
            self.stdin.flush()
        except BrokenPipeError:  # it has ended: what it said last, or its exit status, tells how
            pass

    def _ended(self) -> Isolated:
        status = self.process.wait()
        if status == -getattr(signal, "SIGKILL", 9):  # the system's own guard against running out
            return Isolated(OUT_OF_MEMORY, {})
        raise RuntimeError(f"the measuring process ended with status {status}; its message stands above")


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process, None where the system does not tell."""
    if sys.platform == "linux":
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it has ended
            return None
    if sys.platform == "darwin":
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return int(done.stdout) * 1024 if done.stdout.strip() else None
    return None


def available_mb() -> float:
    """Memory that this process may still take, in 2²⁰ bytes: the system's, or less where a control group limits it; 8,192 where it is not told."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found += [int(line.split()[1]) / 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
    limit, used, parts = (CONTROL_GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        lines = parts.read_text().splitlines() if parts.exists() else ()
        given_back = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))  # pages of files that were read, which count as used
        found.append((int(most) - int(used.read_text()) + given_back) / 2**20)
    return min(found, default=8192.0)


def reset_high_water(pid: int) -> bool:
    """Let Linux note the highest resident memory anew; False where it may not, and what is polled has to serve."""
    if sys.platform != "linux":
        return False
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def high_water(pid: int) -> int:
    """The highest resident memory since `reset_high_water`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on a GPU."""
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "allocate memory" in text)


def _serve(function: str, keep_memory: bool) -> None:
    """The child's side."""
    threading.Thread(target=_end_without_parent, args=(os.getppid(),), daemon=True).start()
    if keep_memory:
        keep_freed_memory()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints must not come between the messages

    def say(event: str, **rest: Any) -> None:
        channel.write(json.dumps({"event": event, **rest}) + "\n")
        channel.flush()

    def peak(step: Callable[[], object]) -> int | None:
        give_back()  # so that what a step takes shows as growth
        say("watch")
        sys.stdin.readline()
        step()
        say("watched")
        grown: int | None = json.loads(sys.stdin.readline())["bytes"]
        return grown

    parameters = json.loads(sys.stdin.readline())
    module, name = function.split(":")
    try:
        load_imports()
        call = getattr(import_module(module), name)
        say("started")
        say("done", figures=call(parameters, peak))
    except InputError as error:
        say("input", message=str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say("out of memory")


def _end_without_parent(parent: int) -> None:
    """End this process when its parent was killed: nobody waits for the figures, and what measures now should have the machine to itself."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    _serve(sys.argv[1], keep_memory="keep" in sys.argv[2:])
