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
    appended: bool = False
    """Whether several values are given by writing it several times."""


def flags_of(kind: Any, *, positional_required: bool = False, prefix: str = "") -> Iterator[Flag]:
    """All flags of a verb's class, groups without a name flattened.

    Args:
        kind: a dataclass.
        positional_required: whether what has no default is written without its name.
        prefix: of all names.
    """
    hints, helps = get_type_hints(kind, include_extras=True), explained(kind)
    for field in dataclasses.fields(kind):
        hint, marks = _unwrapped(hints[field.name])
        own = next((mark for mark in marks if hasattr(mark, "name") and hasattr(mark, "help")), None)
        if tyro.conf.Suppress in marks:
            continue
        if dataclasses.is_dataclass(hint):
            flat = own is not None and own.name == ""
            yield from flags_of(hint, prefix=prefix if flat else f"{prefix}{field.name}.")
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        name = own.name if own is not None and own.name else field.name
        says = own.help if own is not None and own.help else helps.get(field.name, "")
        positional = tyro.conf.Positional in marks or (positional_required and required)
        yield Flag(prefix + name, field.name, hint, says, positional, required, tyro.conf.UseAppendAction in marks)


def given(arguments: Sequence[str]) -> frozenset[str]:
    """The names of the flags among ``arguments``, as `Flag` has them."""
    found: set[str] = set()
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            before, dot, last = name.rpartition(".")
            found |= {name, f"{before}{dot}{last.removeprefix('no_')}"}
    return frozenset(found)


def short_help(kind: type[Any], default: Any, first: Sequence[str], name: str) -> None:
    """Print the help of the flags called ``first`` alone.

    Args:
        kind: class of the verb.
        default: holds the defaults, or None. Where it has no preset, flags that the class names as ``planned`` have none.
        first: names of flags of the verb itself, or of its groups without a name.
        name: of the verb.
    """
    flags = {flag.name: flag for flag in flags_of(kind)}
    fields: list[Any] = []
    values = dict(values_of(default)) if default is not None else {}
    planned = getattr(kind, "planned", ())
    for each in first:
        flag = flags[each]
        hint: Any = Annotated[flag.hint, tyro.conf.Positional] if flag.positional else flag.hint
        value = values.get(each, tyro.MISSING)
        if each in planned and not getattr(default, "preset", None):
            hint, value, flag = flag.hint | None, None, flag._replace(help=f"{flag.help} Planned where it is not given.")
        shown = dataclasses.field(default=value)
        fields.append((flag.field, Annotated[hint, tyro.conf.arg(name=each, help=flag.help)], shown))
    short = dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)
    short.__doc__ = f"{(inspect.getdoc(kind) or '').strip()}\n\n`gam {name} --help-all` lists the other {len(flags) - len(fields)} flags."
    tyro.cli(short, args=["--help"], prog=f"gam {name}")


def values_of(verb: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a verb's flags, by the names that `flags_of` gives them."""
    hints = get_type_hints(type(verb), include_extras=True)
    for field in dataclasses.fields(verb):
        hint, marks = _unwrapped(hints[field.name])
        own = next((mark for mark in marks if hasattr(mark, "name") and hasattr(mark, "help")), None)
        value = getattr(verb, field.name)
        if tyro.conf.Suppress in marks:
            continue
        if dataclasses.is_dataclass(hint):
            flat = own is not None and own.name == ""
            yield from values_of(value, prefix if flat else f"{prefix}{field.name}.")
        else:
            yield prefix + (own.name if own is not None and own.name else field.name), value


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
