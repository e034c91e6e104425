"""The flags of a verb as a list: what `--help` shows first, what a `--config` file may hold, and what was given."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple, cast, get_args, get_origin, get_type_hints

import tyro


class Flag(NamedTuple):
    """A flag of a verb."""

    name: str
    """As it is written after the two dashes, with underscores."""
    field: str
    """Of the dataclass that holds it."""
    hint: Any
    """Its annotation, without what names and explains it."""
    help: str
    positional: bool
    """Whether it is written without its name."""
    required: bool
    """Whether it has no default."""
    group: str
    """The field of the group of flags that holds it; empty for one of the verb itself."""
    appended: bool = False
    """Whether several values are given by writing it several times."""


def flags_of(kind: Any, *, positional_required: bool = False, prefix: str = "", group: str = "") -> Iterator[Flag]:
    """All flags of a verb's class, groups without a name flattened.

    Args:
        kind: a dataclass.
        positional_required: whether what has no default is written without its name.
        prefix: of all names.
        group: the field that holds ``kind``.
    """
    helps = explained(kind)
    for each in _parts(kind, prefix):
        field, marks = each.field, each.marks
        if each.group:
            yield from flags_of(each.hint, prefix=each.name, group=field.name)
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        positional = tyro.conf.Positional in marks or (positional_required and required)
        yield Flag(each.name, field.name, each.hint, each.help or helps.get(field.name, ""), positional, required, group, tyro.conf.UseAppendAction in marks)


def given(arguments: Sequence[str]) -> frozenset[str]:
    """The names of the flags among ``arguments``, as `Flag` has them."""
    found: set[str] = set()
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            before, dot, last = name.rpartition(".")
            found |= {name, f"{before}{dot}{last.removeprefix('no_')}"}
    return frozenset(found)


def values_of(verb: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a verb's flags, by the names that `flags_of` gives them."""
    for each in _parts(type(verb), prefix):
        value = getattr(verb, each.field.name)
        if each.group:
            yield from values_of(value, each.name)
        else:
            yield each.name, value


def defaults_of(kind: Any, default: Any = None, *, prefix: str = "") -> dict[str, Any]:
    """The value of each flag where it is not given, by its name; a flag that has to be given is left out.

    Args:
        kind: a dataclass.
        default: holds the values, or None for those of the class.
        prefix: of all names.
    """
    found: dict[str, Any] = {}
    for each in _parts(kind, prefix):
        value: Any = each.field.default
        if default is not None:
            value = getattr(default, each.field.name)
        elif each.field.default_factory is not dataclasses.MISSING:
            value = each.field.default_factory()
        if each.group:
            found |= defaults_of(each.hint, None if value is dataclasses.MISSING else value, prefix=each.name)
        elif value is not dataclasses.MISSING and not isinstance(value, type(tyro.MISSING)):
            found[each.name] = value
    return found


class _Part(NamedTuple):
    """A field of a verb's class or of a group in it."""

    field: dataclasses.Field[Any]
    hint: Any
    marks: tuple[Any, ...]
    name: str
    """Of the flag; of a group what its flags' names begin with."""
    help: str
    """Empty where the docstring under the field says it."""
    group: bool


def _parts(kind: Any, prefix: str) -> Iterator[_Part]:
    """The fields of a class that are flags or groups of flags."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = _unwrapped(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        own = next((mark for mark in marks if hasattr(mark, "name") and hasattr(mark, "help")), None)
        called = None if own is None else own.name
        group = dataclasses.is_dataclass(hint)
        name = ("" if called == "" else f"{field.name}.") if group else called or field.name
        yield _Part(field, hint, marks, prefix + name, (own and own.help) or "", group)


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without tyro's marks, and these."""
    marks: tuple[Any, ...] = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        marks += tuple(more)
    return hint, marks


@cache
def explained(kind: Hashable) -> dict[str, str]:
    """The docstring under each field of a class; empty where its source is not there."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cast(type[Any], kind)))).body
    except (OSError, TypeError):  # it was made at run time
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(before.target)] = " ".join(str(after.value.value).split())
    return found
