"""Several values of one number: `gam bench --learning-rate 1e-3 2e-3 4e-3` trains every model with each of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from gam_lm.cli.flag_list import Flag
from gam_lm.errors import InputError

GROUPS = ("recipe", "architecture")
"""The groups of flags whose numbers may be swept."""

ELSEWHERE = {"seed": "--seeds 0 1 2 trains every seed", "vocab_size": "every model of a comparison has one vocabulary"}
"""Numbers that take one value here, and why."""


def take_sweep(words: Sequence[str], flags: Sequence[Flag]) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    """The words with the first of several values alone, and the fields with all their values.

    Args:
        words: the arguments after the verb.
        flags: of the verb.

    Raises:
        InputError: for a value that is no number, or several of a number that takes one.
    """
    numbers = {f"--{flag.name}": (flag, kind) for flag in flags if flag.group in GROUPS and (kind := _kind(flag.hint)) is not None}
    kept: list[str] = []
    sweep: dict[str, tuple[float, ...]] = {}
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        kept.append(word)
        found = numbers.get(word.replace("-", "_").replace("__", "--", 1))
        if found is None:
            continue
        values = []
        while at < len(words) and not words[at].startswith("--"):
            values.append(words[at])
            at += 1
        kept += values[:1]
        if len(values) > 1:
            flag, kind = found
            if flag.name in ELSEWHERE:
                raise InputError(f"{flag.name} has {len(values)} values, {' '.join(values)}: give one, {ELSEWHERE[flag.name]}")
            sweep[flag.field] = tuple(dict.fromkeys(_number(flag.name, kind, value) for value in values))
    return kept, sweep


def _kind(hint: Any) -> type[int] | type[float] | None:
    """int or float where the annotation is one of them, alone or beside None."""
    hint = _bare(hint)
    some = {_bare(each) for each in get_args(hint)} - {type(None)} if get_origin(hint) in (Union, UnionType) else {hint}
    return next((kind for kind in (int, float) if some == {kind}), None)


def _bare(hint: Any) -> Any:
    """An annotation without its range."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint


def _number(name: str, kind: type[int] | type[float], text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        kinds, example = ("whole numbers", "64 128") if kind is int else ("numbers", "1e-3 2e-3")
        raise InputError(f"{name} has {text!r} among its values: write {kinds}, as in --{name.replace('_', '-')} {example}") from None
