"""`--config run.toml`: any flags of a verb from a file, and the file that repeats a command.

A key is the name of a flag (``batch_size`` or ``batch-size``), a table holds the options of a mixer (``[gam]``, ``write = "mean"``). A flag on the command line
goes before the file.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gam_lm.cli.flag_list import Flag, given
from gam_lm.errors import InputError, unknown_name
from gam_lm.runtime.files import explained

FLAG = "--config"


def with_config(arguments: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """The arguments with those of the file that ``--config`` names, which is taken out, before them.

    Args:
        arguments: after the verb.
        flags: of the verb.

    Raises:
        InputError: for a file that cannot be read, or a key or value that is none of the verb's.
    """
    rest, path = _split(arguments)
    if path is None:
        return rest
    known = {flag.name: flag for flag in flags}
    named = given(rest)
    positional = list(_leading_words(rest))
    words: list[str] = []
    bare: list[str] = []
    for name, value in _flat(_read(path)):
        if name not in known:
            raise unknown_name(f"key in {path}", name, known)
        if name in named or value is None:
            continue
        if not known[name].positional:
            words += _words(known[name], value, path)
        elif not positional:
            bare += [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return [*bare, *words, *rest] if not positional else [*rest, *words]


def to_toml(values: Mapping[str, Any]) -> str:
    """A TOML text of numbers, texts, truth values and lists of these, and tables of such one level deep; what is None is left out."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    lines = [f"{key} = {_literal(value)}" for key, value in plain.items()]
    for table, inner in values.items():
        if isinstance(inner, Mapping):
            lines += ["", f"[{table}]", *(f"{key} = {_literal(value)}" for key, value in inner.items() if value is not None)]
    return "\n".join(lines) + "\n"


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


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"config is {str(path)!r}: there is no such file")
    try:
        with explained(path, "read"):
            return tomllib.loads(path.read_text(encoding="utf-8"))
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
        return [flag, *map(str, value)]
    if isinstance(value, int | float | str):
        return [flag, str(value)]
    raise InputError(f"{name} in {path} is {value!r}: use a number, a text, true, false or a list of them")
