"""`--help` and `--help-all`: the flags of a verb under what they do, each with the default that acts."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gam_lm.cli.flag_list import Flag, defaults_of, flags_of
from gam_lm.cli.terminal import readable, standard_output

TITLES = {"text": "Text", "words": "Text", "architecture": "Model", "recipe": "Training"}
"""By field: the title of a group of flags."""

LABEL = 28
"""Columns of a flag and what it takes: more goes on the next line."""

WIDEST = 110
"""Columns of the help on a wide terminal."""

KINDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def show_help(kind: type[Any], default: Any, name: str, *, all_flags: bool, positional: bool) -> None:
    """Print the help of a verb.

    Args:
        kind: class of the verb. Its ``first`` names the flags that are shown first, under their titles; without it all are.
        default: holds the defaults, or None for those of the class. Where it has no preset, flags that the class names as ``planned`` have none.
        name: of the verb.
        all_flags: whether to show the flags besides the first ones too.
        positional: whether what has no default is given without its name.
    """
    from rich.table import Table
    from rich.text import Text

    flags = {flag.name: flag for flag in flags_of(kind, positional_required=positional)}
    values = defaults_of(kind, default)
    planned = getattr(kind, "planned", ()) if not getattr(default, "preset", None) else ()
    shown = _groups(flags, getattr(kind, "first", {}), all_flags)
    console = standard_output()
    console.width = min(console.width, WIDEST)
    words = ["usage:", "gam", name, *(_label(flag) for flag in flags.values() if flag.positional), *(["[flags]"] if flags else [])]
    console.print(Text(readable(" ".join(words)), "bold"))
    console.print(Text("\n" + readable(_plain(inspect.getdoc(kind) or ""))))
    for title, names in shown.items():
        console.print(Text(f"\n{title}", "bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=2)
        labels = {each: Text(readable(_label(flags[each], values.get(each))), "bold", overflow="fold") for each in names}
        longest = max(len(word) for label in labels.values() for word in label.plain.split())
        table.add_column(width=max(longest, min(LABEL, max(len(label) for label in labels.values()))))
        table.add_column(ratio=1)
        for each in names:
            flag = flags[each]
            says = Text(readable(_plain(flag.help)))
            says.append(f" ({note})" if (note := "planned" if each in planned else _default(values, each)) else "", "dim")
            table.add_row("", labels[each], says)
        console.print(table)
    rest = len(flags) - sum(map(len, shown.values()))
    end = [f"gam {name} --help-all shows {'the other flag' if rest == 1 else f'the other {rest} flags'}."] if rest else []
    if all_flags and getattr(kind, "first", {}):
        end = [f"gam {name} --help shows the first of them alone."]
    console.print(Text("\n" + " ".join([*end, "--config FILE.toml gives any of them."])) if flags else Text("\nIt has no flags."))


def _groups(flags: Mapping[str, Flag], first: Mapping[str, Sequence[str]], all_flags: bool) -> dict[str, list[str]]:
    """Names of flags by title."""
    found = {title: list(names) for title, names in first.items()}
    known = {name for names in found.values() for name in names}
    if not found or all_flags:
        for name, flag in flags.items():
            if name not in known:
                title = TITLES.get(flag.group, f"Options of {flag.group}") if flag.group else ("More" if found else "Flags")
                found.setdefault(title, []).append(name)
    return found


def _label(flag: Flag, default: object = None) -> str:
    """A flag as it is written, with what it takes; of a truth value the one that changes it."""
    name = flag.name.replace("_", "-")
    if flag.positional:
        several = get_origin(flag.hint) is tuple
        return name.upper().replace("-", "_") + (" …" if several else "")
    if flag.hint is bool:
        before, dot, last = name.rpartition(".")
        return f"--{before}{dot}no-{last}" if default is True else f"--{name}"
    return f"--{name} {_takes(flag.hint)}"


def _takes(hint: Any) -> str:
    """The value of a flag, in a word."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _takes(inside[0])
    if origin is Literal:
        return "{" + ",".join(map(str, inside)) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(_takes(each) for each in inside if each is not type(None))
    if origin is tuple:
        return f"{_takes(inside[0])} …" if inside[-1] is Ellipsis else " ".join(map(_takes, inside))
    return KINDS.get(hint, "VALUE")


def _default(values: Mapping[str, Any], name: str) -> str:
    """What acts where the flag is not given; empty for nothing."""
    if name not in values:
        return "required"
    value = values[name]
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return "by default on" if value else ""
    return "by default " + (" ".join(map(_shown, value)) if isinstance(value, tuple) else _shown(value))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(docstring: str) -> str:
    """A docstring's words for a terminal."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs).replace("``", "`")
