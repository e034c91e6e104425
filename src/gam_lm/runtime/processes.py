"""The processes of one command, as torchrun, Slurm and Ray describe them: RANK, LOCAL_RANK and WORLD_SIZE. Imports no torch."""

from __future__ import annotations

import os


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
