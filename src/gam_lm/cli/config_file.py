"""`--config run.toml`: any flags of a verb from a file, and the file that repeats a command.

A key is the name of a flag (``batch_size`` or ``batch-size``), a table holds the options of a mixer (``[gam]``, ``write = "mean"``). A flag on the command line
goes before the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

from gam_lm.cli.flag_list import Flag, given, values_of
from gam_lm.errors import InputError, unknown_name
from gam_lm.runtime.files import explained, write_text

FLAG = "--config"

FILE = "run.toml"
"""The file that repeats a command, in its folder."""


def with_config(arguments: Sequence[str], flags: Sequence[Flag], one_of: Sequence[Sequence[str]] = ()) -> list[str]:
    """The arguments with those of the file that ``--config`` names, which is taken out, before them.

    Args:
        arguments: after the verb.
        flags: of the verb.
        one_of: names of which a command has one alone: where the arguments have it, it goes before the others in the file.

    Raises:
        InputError: for a file that cannot be read, or a key or value that is none of the verb's.
    """
    rest, path = _split(arguments)
    if path is None:
        return rest
    known = {flag.name: flag for flag in flags}
    leading, positional = list(_leading_words(rest)), list(_positional_words(rest, known))
    named = {*given(rest), *(flag.name for flag in flags if flag.positional and positional)}
    named |= {name for names in one_of if named & {*names} for name in names}
    words: list[str] = []
    bare: list[str] = []
    for name, value in _flat(_read(path)):
        if name not in known:
            raise unknown_name(f"key in {path}", name, known)
        if name in named or value is None:
            continue
        if not known[name].positional:
            words += _words(known[name], value, path)
        else:
            bare += [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return [*bare, *words, *rest] if not leading else [*rest, *words]


def to_toml(values: Mapping[str, Any]) -> str:
    """A TOML text of numbers, texts, truth values and lists of these, and tables of such one level deep; what is None is left out."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    lines = [_line(key, value) for key, value in plain.items()]
    for table, inner in values.items():
        if isinstance(inner, Mapping):
            lines += ["", f"[{table}]", *(_line(key, value) for key, value in inner.items() if value is not None)]
    return "\n".join(lines) + "\n"


def with_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the word None for what is None, also in tables: the flag's value where nothing is to be chosen in its place."""
    return {key: with_nothing(value) if isinstance(value, Mapping) else "None" if value is None else value for key, value in values.items()}


def _line(key: str, value: Any) -> str:
    line = f"{key} = {_literal(value)}"
    shown = line.encode("utf-8", "backslashreplace").decode()
    return line if shown == line else f"# give this on the command line, a file cannot hold a name that is no UTF-8: {shown}"


def repeating(verb: Any) -> str:
    """The file that repeats a verb: all its flags as they are, whatever a later version's defaults or presets will be."""
    kind = type(verb)
    required = {field.name: tyro.MISSING for field in dataclasses.fields(kind) if field.default is field.default_factory is dataclasses.MISSING}
    defaults = dict(values_of(kind.defaults([])[0] if hasattr(kind, "defaults") else kind(**required)))
    flat: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    several = getattr(verb, "sweep", {})
    for name, value in values_of(verb):
        value = several.get(name, value)
        if name == "preset" or value == ():  # what the preset gave stands in the other flags
            continue
        if value is None:
            value = None if defaults[name] is None else "None"
        elif not isinstance(value, bool | int | float | tuple):
            value = str(value)
        table, _, last = name.rpartition(".")
        (tables.setdefault(table, {}) if table else flat)[last] = value
    return to_toml(flat | {name: values for name, values in tables.items() if any(value is not None for value in values.values())})


def keep_repeating(verb: Any) -> None:
    """Write run.toml into the folder of a verb that measures, once that has rows or is to have some."""
    folder = verb.out / getattr(verb, "part", "")
    if any(folder.glob("results.json")) or any(folder.glob("*/results.json")):
        write_text(folder / FILE, repeating(dataclasses.replace(verb, out=folder)))


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")


def _split(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    path: Path | None = None
    words = iter(arguments)
    for word in words:
        if word == FLAG:
            if (value := next(words, None)) is None:
                raise InputError("config has no value: name a .toml file")
            path = Path(value)
        elif word.startswith(FLAG + "="):
            path = Path(word.split("=", 1)[1])
        else:
            rest.append(word)
    return rest, path


def _leading_words(arguments: Sequence[str]) -> Iterator[str]:
    for word in arguments:
        if word.startswith("-"):
            return
        yield word


def _positional_words(arguments: Sequence[str], known: Mapping[str, Flag]) -> Iterator[str]:
    """The words that are no flags and no values of flags."""
    values = 0.0
    for word in arguments:
        if word.startswith("-") and word != "-" and not word[1:2].isdigit():
            name, equals, _ = word.lstrip("-").partition("=")
            flag = known.get(name.replace("-", "_"))
            values = 0 if equals or flag is None or flag.hint is bool else _number_of_values(flag)
        elif values > 0:
            values -= 1
        else:
            yield word


def _number_of_values(flag: Flag) -> float:
    """How many words follow a flag; of a list of any length all."""
    lists = [hint for hint in (flag.hint, *get_args(flag.hint)) if get_origin(hint) is tuple]
    if not lists or flag.appended:
        return 1
    inner = get_args(lists[0])
    return math.inf if Ellipsis in inner else len(inner)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"config is {str(path)!r}: there is no such file")
    try:
        with explained(path, "read"):
            return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise InputError(f"config {str(path)!r} is nested too deeply: write lines such as batch_size = 16") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config {str(path)!r} is no TOML ({error}): write lines such as batch_size = 16") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = prefix + key.replace("-", "_")
        if isinstance(value, Mapping):
            yield from _flat(value, name + ".")
        else:
            yield name, value


def _words(known: Flag, value: Any, path: Path) -> list[str]:
    name = known.name
    before, dot, last = name.rpartition(".")
    dashed = f"{before.replace('_', '-')}{dot}"
    flag = f"--{dashed}{last.replace('_', '-')}"
    if isinstance(value, bool) and known.hint is bool:
        return [flag if value else f"--{dashed}no-{last.replace('_', '-')}"]
    if isinstance(value, list):
        return [word for each in value for word in (flag, str(each))] if known.appended else [flag, *map(str, value)]
    if isinstance(value, int | float | str):
        return [flag, str(value)]
    raise InputError(f"{name} in {path} is {value!r}: use a number, a text, true, false or a list of them")
