"""What happens to a job of two processes when one of them dies or is stopped, and whether the same command then makes the run that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import gam_lm
from gam_lm.checkpoint import load_model
from gam_lm.errors import InputError
from gam_lm.experiments.strike import FAULT

PROCESSES = 2
STEPS, BATCH, CONTEXT, EVERY = 100, 6, 16, 10
"""Of the run: optimiser steps, sequences and tokens of one, steps between two states."""

LIMIT = 300.0
"""Seconds after which a job that did not end is ended: many times what one takes."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a job."""

    name: str
    signal: str = "SIGKILL"
    rank: int = 1
    """The process that acts."""
    moment: str = "state"
    """See `gam_lm.experiments.strike.FAULT`."""
    launcher: bool = False
    """Whether the launcher's process group gets the signal, as from Ctrl-C."""
    restarts: int = 0
    """Of torchrun."""


FAULTS = (
    Fault(name="SIGKILL of process 0", rank=0),
    Fault(name="SIGKILL of process 1"),
    Fault(name="SIGTERM of process 1", signal="SIGTERM"),
    Fault(name="Ctrl-C at the launcher", signal="SIGINT", launcher=True),
    Fault(name="SIGKILL of process 1 while a state is written", moment="writing"),
    Fault(name="SIGKILL of process 1, torchrun --max-restarts 1", restarts=1),
)


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    status: int
    """0 where the run is whole."""
    said: tuple[str, ...]
    """The lines that say how to go on."""
    errors: str
    """All of the standard error."""
    seconds: float | None
    """From the fault to the end of all processes; None where nothing struck."""


def job(train: Sequence[str], run: Path, fault: Fault | None = None, *, processes: int = PROCESSES, restarts: int = 0) -> Ended:
    """Start `gam train` with ``train`` on several processes of one thread, and wait for the end of all of them.

    Args:
        train: flags of `gam train`.
        run: the run directory.
        fault: what happens; nothing where it is None.
        processes: of torchrun.
        restarts: of torchrun.

    Raises:
        InputError: where the job does not end.
    """
    struck = run.parent / f"{run.name}-struck"
    struck.unlink(missing_ok=True)
    told = {} if fault is None else {FAULT: json.dumps(asdict(fault) | {"run": str(run), "struck": str(struck)})}
    here = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(gam_lm.__file__).parents[1])}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    command = [sys.executable, *launcher, "-m", "gam_lm", "--import", "gam_lm.experiments.strike", "train", *train, "--out", str(run)]
    started: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=os.environ | here | told, **started) as process:
        try:
            _, errors = process.communicate(timeout=LIMIT)  # the pipe closes when the last process has ended
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun hands it on, and kills after 30 s whoever did not end
            try:
                process.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise InputError(f"a job of {processes} processes did not end in {LIMIT:.0f} s: look for its processes, and end them") from None
    seconds = time.time() - float(struck.read_text(encoding="utf-8")) if struck.exists() else None
    said = tuple(line for line in errors.splitlines() if "the same command goes on" in line)
    return Ended(process.returncode, said, errors, seconds)


def faults(name: str, base: dict[str, Any], data: str) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The identity of each row for the model ``name``, and what measures it.

    Args:
        name: of a model.
        base: its sizes, as a run's flags name them.
        data: folder of the text; the run that nothing happens to is written beside it.
    """
    train = [
        "--model", name, "--data", data, *_flags(base), "--steps", str(STEPS), "--batch-size", str(BATCH), "--context", str(CONTEXT), "--precision", "fp32",
        "--device", "cpu", "--compile", "off", "--checkpoint-every", str(EVERY), "--shard",
    ]  # fmt: skip
    whole = cache(lambda: _whole(train, Path(data).parent / f"whole-{name}"))  # one for all rows
    for fault in FAULTS:
        own = {"model": name, "dtype": "fp32", "batch_size": BATCH, "context": CONTEXT, "variant": f"fault: {fault.name}"}
        yield own, partial(_outcome, train, fault, whole)


def _flags(base: dict[str, Any]) -> list[str]:
    """The flags of `gam train` for these fields of a configuration."""
    sizes = [word for key, value in base.items() if key != "options" for word in (f"--{key.replace('_', '-')}", str(value))]
    return sizes + [word for mixer, fields in base.get("options", {}).items() for key, value in fields.items() for word in (
        f"--{mixer.replace('_', '-')}.{key.replace('_', '-')}", str(value))]  # fmt: skip


def _whole(train: Sequence[str], run: Path) -> Path:
    """The run that nothing happens to."""
    _finish(train, run)
    return run


def _finish(train: Sequence[str], run: Path) -> None:
    ended = job(train, run)
    if ended.status:
        raise InputError(f"a job that nothing was done to ended with status {ended.status}: {ended.errors.strip()[-500:]}")


def _outcome(train: Sequence[str], fault: Fault, whole: Callable[[], Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        ended = job(train, run, fault, restarts=fault.restarts)
        if ended.seconds is None:
            raise InputError(f"{fault.name}: the job ended with status {ended.status} before the fault: {ended.errors.strip()[-500:]}")
        again = bool(ended.status)
        if again:
            _finish(train, run)
        return outcome(ended, fault) | {"same_command_given_again": again} | differences(whole(), run)


def outcome(ended: Ended, fault: Fault) -> dict[str, Any]:
    """What a row says of the end of a job: seconds, its messages, and whether a process is named that did not live."""
    named = any(f"process {fault.rank} of {PROCESSES} died" in line for line in ended.said)
    return {
        "processes": PROCESSES, "steps": STEPS, "checkpoint_every": EVERY, "signal": fault.signal, "exit_status": ended.status,
        "seconds_to_end": ended.seconds, "messages": list(ended.said), "names_process": named, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def differences(whole: Path, run: Path) -> dict[str, float]:
    """The largest differences of weights and of losses (nats) between two finished runs; 0 where they are the same to the bit.

    Raises:
        ValueError: where the metrics are not of the same steps.
    """
    expected, found = (torch.cat([p.detach().flatten() for p in load_model(path).parameters()]) for path in (whole, run))
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()] for path in (whole, run)]
    losses = [[(line["step"], key, line[key]) for line in each for key in ("train_nats", "val_nats") if key in line] for each in lines]
    if [each[:2] for each in losses[0]] != [each[:2] for each in losses[1]]:
        raise ValueError(f"the metrics of {run} are not of the steps of {whole}")
    return {
        "weights_difference": float((found - expected).abs().max()),
        "losses_difference_nats": max(abs(a[2] - b[2]) for a, b in zip(*losses, strict=True)),
    }
