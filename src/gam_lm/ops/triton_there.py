"""Where the library's Triton kernels run unasked. Does not import Triton, which is an extra."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    """Whether it can be imported."""
    return find_spec("triton") is not None


def triton_serves(device_type: str, dtype: torch.dtype) -> bool:
    """Whether "auto" may take a kernel on such a device for such a format."""
    return device_type == "cuda" and dtype != torch.float64 and has_triton()
