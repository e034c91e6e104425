"""A fault that a process brings upon its own job: `gam --import gam_lm.experiments.strike`, told by the environment variable FAULT. Without it nothing happens."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

FAULT = "GAM_LM_FAULT"
"""JSON: ``signal`` by name, ``rank`` that acts, ``moment`` ("state": the first state is there; "writing": it has written its part of the second one),
``launcher`` (whether the signal is for the launcher's process group, as Ctrl-C is), ``run``, the run directory, and ``struck``, a file that takes the time."""


def _strike(fault: dict[str, Any]) -> None:
    Path(fault["struck"]).write_text(repr(time.time()), encoding="utf-8")
    number = signal.Signals[fault["signal"]]
    if fault["launcher"]:
        os.killpg(os.getpgid(os.getppid()), number)
    else:
        os.kill(os.getpid(), number)


def _when_a_state_is_there(fault: dict[str, Any]) -> None:
    while not any((Path(fault["run"]) / "state").glob("step-*")):
        time.sleep(0.005)
    _strike(fault)


def _when_a_state_is_half_written(fault: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    write = HuggingFaceStorageWriter.write_data

    def write_and_strike(self: Any, *arguments: Any, **named: Any) -> Any:
        written = write(self, *arguments, **named)
        if any((Path(fault["run"]) / "state").glob("step-*")):  # one to go on from
            _strike(fault)
        return written

    HuggingFaceStorageWriter.write_data = write_and_strike  # type: ignore[method-assign]


def _prepare() -> None:
    fault = json.loads(os.environ.get(FAULT, "null"))
    if fault is None or os.environ.get("RANK") != str(fault["rank"]) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if fault["moment"] == "writing":
        _when_a_state_is_half_written(fault)
    else:
        threading.Thread(target=_when_a_state_is_there, args=(fault,), daemon=True).start()


_prepare()
