"""What verbs share: a flag read ahead of the real parsing, and the command as it was typed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    import torch

FLAT = tyro.conf.arg(name="")
"""Marks a group of flags that has no prefix of its own."""


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag, the last where it is repeated, before the real parsing, which needs the defaults that depend on it."""
    found = None
    for argument, after in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == flag and after is not None:
            found = after
        elif argument.startswith(flag + "="):
            found = argument.split("=", 1)[1]
    return found


def command_line() -> str:
    """The command as it was typed, for results.json."""
    return f"gam {shlex.join(sys.argv[1:])}"


def share_out(workers: int, out: Path, device: torch.device) -> None:
    """Have ``workers`` processes do this command's work below ``out``, on all GPUs of the machine where ``device`` is one."""
    import os

    import torch

    from gam_lm.runtime.workers import fan_out

    gpus: list[str] = []
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    fan_out(workers, out, gpus=gpus)
