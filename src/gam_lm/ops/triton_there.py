"""Whether Triton, an extra, is installed. Imports neither it nor torch."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether it can be imported."""
    return find_spec("triton") is not None
