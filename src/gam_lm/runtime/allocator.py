"""Memory of the process that is freed and asked for again at every step. Imports no torch.

A step of training frees its tensors and asks for the same ones again. Between the two, glibc returns blocks of 32 MB and more to the system at once, and the system
hands them out anew page by page, each filled with zeros: half the time of a block at 16,384 tokens. Told to keep them, a process stays as large as it was at most.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in large pages where the system has them, until it ends; whether the C library could be told so.

    The verbs of ``gam`` do so. A script that trains on a CPU calls it before its first tensor. What the user set in the environment (mallopt(3)'s
    ``MALLOC_*_``, PyTorch's ``THP_MEM_ALLOC_ENABLE``) stands.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    # Large pages also keep the blocks of a heap aligned, so that a new tensor fits where an old one was: a fifth less memory than without.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first tensor
    kept = True
    for variable, option, value in (("MALLOC_TRIM_THRESHOLD_", M_TRIM_THRESHOLD, -1), ("MALLOC_MMAP_MAX_", M_MMAP_MAX, 0)):
        if variable not in os.environ:
            kept = bool(mallopt(option, value)) and kept
    return kept


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of glibc; None with another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
