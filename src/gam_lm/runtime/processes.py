"""The processes of one command, as torchrun, Slurm and Ray describe them: RANK, LOCAL_RANK and WORLD_SIZE. Imports no torch."""

from __future__ import annotations

import os

from gam_lm.errors import InputError, shortened


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Its number on this machine, from 0."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes on this machine; where the launcher does not say, all of them."""
    return _number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else world_size()


def _number(variable: str, least: int) -> int:
    """What a launcher says. Raises InputError for what is no number of at least ``least``."""
    said = os.environ.get(variable, str(least))
    if not (said.isascii() and said.isdecimal() and int(said) >= least):
        raise InputError(f"the environment variable {variable} is {shortened(said)}: a launcher sets it to a whole number of at least {least}, or unset it")
    return int(said)
