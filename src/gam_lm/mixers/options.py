"""What one kind of mixer reads: a frozen class of options beside each mixer. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gam_lm.errors import InputError, checked

Positive = Annotated[int, Field(ge=1, lt=2**31)]
"""A whole number of at least 1, such as a size or a count."""

Expansion = Annotated[float, Field(gt=0, le=1024)]
"""A width over hidden_size."""

HEADS, HEAD_SIZE = 4, 64
"""Heads by default: so many, and more where each would be wider than this."""


@checked
class MixerOptions:
    """The base of every options class. A subclass adds the fields of its mixer, each with its explanation, and checks them in ``__post_init__``."""

    feed_forward: ClassVar[bool] = True
    """Whether a block around this mixer has a feed-forward network where the model does not say."""
    expansion: ClassVar[str | None] = None
    """The field that widens the mixer, as a multiple of the hidden size, where no feed-forward network can be widened to match a number of parameters."""

    backend: str = "auto"
    """Which implementation runs; auto takes the fastest that is there."""

    def resolved(self, hidden_size: int) -> MixerOptions:
        """The options with every None that stands for "derived from the width" filled in.

        Raises:
            InputError: for options that do not fit ``hidden_size``.
        """
        return self

    def enlarged(self, ratio: float) -> MixerOptions:
        """The options of a model ``ratio`` times as wide: heads keep their size, everything else of the width grows with it."""
        return self

    def replace(self, **changes: Any) -> Any:
        """A copy with other values, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


def default_heads(hidden_size: int) -> int:
    """Heads of at most 64 channels and at least 4 of them, as far as the width divides into heads of even width."""
    most = max(HEADS, hidden_size // HEAD_SIZE)
    return next((n for n in range(most, 1, -1) if hidden_size % (2 * n) == 0), 1)


def check_heads(field: str, heads: int, hidden_size: int) -> None:
    """Raise InputError where ``heads`` does not divide the width."""
    if hidden_size % heads:
        raise InputError(f"{field} is {heads}, which does not divide hidden_size={hidden_size}: use a divisor, or another width")
