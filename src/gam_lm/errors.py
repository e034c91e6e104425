"""One kind of error for everything that a user can put right, and configurations that raise it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


class InputError(Exception):
    """The user's input cannot be used.

    The message is one line that names the field, its value and the fix. The command line prints it and exits with 2; it never
    shows a traceback. (No ValueError: the parser of flags would take that for its own and print a box around it.)
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))  # a name that it quotes may hold line breaks


class MissingExtraError(InputError):
    """An optional package is not installed; the message carries the pip command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'gam-lm[{extra}]'")


class DivergedError(Exception):
    """Training reached a loss, gradient or weight that is not finite. The command line prints the one line and exits with 3.

    Args:
        what: is not finite.
        layer: where it appeared first.
        learning_rate: of the step.
        step: optimiser steps before it, where known; they went well.
    """

    def __init__(self, what: str, layer: str, learning_rate: float, step: int | None = None) -> None:
        self.what, self.layer, self.learning_rate, self.step = what, layer, learning_rate, step
        where = "" if step is None else f" at step {step + 1}"
        super().__init__(
            f"training diverged{where}: {what} is not finite, first in {layer}, at learning rate {learning_rate:.3g}; "
            "use a lower learning rate, more warm-up steps or a smaller clip"
        )

    def figures(self) -> dict[str, Any]:
        """What a row of results says of it."""
        return {"step": self.step, "learning_rate": self.learning_rate, "layer": self.layer, "what": self.what}

    def at(self, step: int) -> DivergedError:
        """The same after ``step`` steps."""
        return DivergedError(self.what, self.layer, self.learning_rate, step)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error for a name that is not in ``known``, with the nearest one that is."""
    known = sorted({*known})
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
    return InputError(f"unknown {kind} {shortened(name)}: {hint}")


def check_object(kind: str, values: Any) -> None:
    """Raise InputError where ``values``, which was read as ``kind``, is no mapping."""
    if not isinstance(values, Mapping):
        raise InputError(f"{kind} is {shortened(values)}: use an object, {{field: value}}")


RANGES = {
    "greater_than": ("gt", "a number above {}"), "greater_than_equal": ("ge", "a number of at least {}"),
    "less_than": ("lt", "a number below {}"), "less_than_equal": ("le", "a number of at most {}"),
}  # fmt: skip
KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false", "string": "a text", "tuple": "a list",
    "list": "a list", "dict": "an object", "none": "null",
}  # fmt: skip


@dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(kind: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose values pydantic checks strictly against their annotations, ranges included.

    No value is converted (a list given for a tuple excepted, which JSON has no other way to write): a string is no number, 1 is no boolean, NaN and infinity
    are no numbers. What does not fit raises an InputError of one line that names the field, the value and the fix.
    """
    from pydantic import ConfigDict, ValidationError
    from pydantic.dataclasses import dataclass

    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    made: Any = dataclass(frozen=True, kw_only=True, config=config)(kind)
    construct = made.__init__
    fields = [field.name for field in dataclasses.fields(made)]

    @functools.wraps(construct)
    def __init__(self: Any, **values: Any) -> None:
        for name in values:
            if name not in fields:
                raise unknown_name(f"field of {kind.__name__}", name, fields)
        try:
            construct(self, **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        except ValidationError as error:
            raise one_line(error.errors()) from None

    made.__init__ = __init__
    return made


def one_line(errors: Sequence[Any]) -> InputError:
    """What pydantic found wrong first, as field, value and fix; of a union's branches all that would do."""
    first = errors[0]
    field = str(first["loc"][0])
    value = first["input"]
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return InputError(f"{field} is missing: give {field}")
    if first["type"] == "literal_error" and isinstance(value, str):
        choices = [choice.strip("'") for choice in first["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return unknown_name(field, value, choices)
    fixes = [_fix(each) for each in errors if str(each["loc"][0]) == field]
    return InputError(f"{field} is {shortened(value)}: use {' or '.join(dict.fromkeys(fixes))}")


def place_and_fix(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as words without a subject: the whole way to the value, the value, and the fix."""
    place = ".".join(str(each) for each in error["loc"]) or "the whole"
    return f"{place} is missing" if error["type"] == "missing" else f"{place} is {shortened(error['input'])}: use {_fix(error)}"


def _fix(error: Any) -> str:
    kind = error["type"]
    if kind in RANGES:
        bound, words = RANGES[kind]
        return words.format(error["ctx"][bound])
    if kind == "literal_error":
        return str(error["ctx"]["expected"])
    if kind == "too_short":
        return f"at least {error['ctx']['min_length']} of them"
    if kind == "too_long":
        return f"at most {error['ctx']['max_length']} of them"
    if kind == "missing":
        return f"at least {error['loc'][1] + 1} of them"
    return KINDS.get(kind.split("_")[0], str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, "))


def shortened(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
