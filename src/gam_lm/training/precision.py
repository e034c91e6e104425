"""Which device and which number format, and why."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from gam_lm.errors import InputError
from gam_lm.ops.number_formats import trains_faster_in_bf16

logger = logging.getLogger("gam_lm")


def choose_device(name: str = "auto") -> torch.device:
    """The device called ``name``; auto takes CUDA, else the CPU. Logs why. Raises InputError for one that is not there."""
    if name == "auto":
        found = torch.cuda.is_available()
        logger.info("device %s: %s", "cuda" if found else "cpu", torch.cuda.get_device_name() if found else "no CUDA found")
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that holds no numbers, as meta, has none to give back
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]  # torch lists all of its backends
        raise InputError(f"device is {name!r}, which is not here ({reason}): use auto or cpu") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of the matrix products: torch.float32 or torch.bfloat16. Logs why."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    faster = trains_faster_in_bf16(device)
    logger.info("precision %s: %s has %s matrix unit for bf16", "bf16" if faster else "fp32", device.type, "a" if faster else "no")
    return torch.bfloat16 if faster else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to ``dtype``, or nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
