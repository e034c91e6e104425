"""What verbs share: a flag read ahead of the real parsing, and the command as it was typed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import tyro

FLAT = tyro.conf.arg(name="")
"""Marks a group of flags that has no prefix of its own."""


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag before the real parsing, which needs the defaults that depend on it."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def command_line() -> str:
    """The command as it was typed, for results.json."""
    return f"gam {shlex.join(sys.argv[1:])}"
