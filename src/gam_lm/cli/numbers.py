"""The ranges of a verb's own numbers, checked for every verb before it runs. The recipe and the architecture check theirs themselves."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

from pydantic import Field

from gam_lm.errors import one_line

Count = Annotated[int, Field(ge=1, lt=2**31)]
"""A whole number of at least 1."""
Natural = Annotated[int, Field(ge=0, lt=2**31)]
"""A whole number of at least 0."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed of a training."""
Above = Annotated[float, Field(gt=0)]
"""A number above 0."""

DrawSeed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A seed of torch's draws."""
Temperature = Annotated[float, Field(ge=0)]
"""Of draws; 0 takes the likeliest."""
TopP = Annotated[float, Field(gt=0, le=1)]
"""A probability above 0."""


def check_numbers(verb: Any) -> None:
    """Check every field of ``verb`` that holds numbers, and those of its groups of flags, against its annotation. NaN and infinity are never allowed.

    Raises:
        InputError: of one line with the field, the value and the range.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if not dataclasses.is_dataclass(verb):
        return
    hints = typing.get_type_hints(type(verb), include_extras=True)
    for field in dataclasses.fields(verb):
        value, hint = getattr(verb, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            if not hasattr(value, "__pydantic_validator__"):  # those that pydantic made are checked
                check_numbers(value)
        elif _holds_numbers(hint):
            try:
                TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
            except ValidationError as error:
                raise one_line([{**each, "loc": (field.name, *each["loc"])} for each in error.errors()]) from None


def _holds_numbers(hint: Any) -> bool:
    return hint in (int, float) or any(_holds_numbers(each) for each in typing.get_args(hint))
