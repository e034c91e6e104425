"""What is wrong with the words of a command, in one line.

tyro decides whether they are wrong and says it in a box of many lines. Here the same words are read once more, against the same annotations, for the line that
every other error of the library has: flag, value and fix. What is not found here is the text of the box on one line.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gam_lm.cli.flag_list import Flag
from gam_lm.errors import InputError, shortened

SHELLS = ("bash", "zsh", "tcsh", "fish")
"""That tyro writes completions for."""


@contextlib.contextmanager
def in_one_line(verb: str, flags: Sequence[Flag], words: Sequence[str]) -> Iterator[None]:
    """Parse within this: where the parser refuses the words, one line is raised and its box is not printed.

    Args:
        verb: its name.
        flags: of the verb.
        words: after the verb.

    Raises:
        InputError: for words that the parser refuses.
    """
    if words and words[0].replace("_", "-") in ("--tyro-print-completion", "--tyro-write-completion") and (len(words) < 2 or words[1] not in SHELLS):
        raise InputError(f"{words[0]} is {shortened(words[1]) if len(words) > 1 else 'without a shell'}: use one of {', '.join(SHELLS)}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as done:
        if done.code != 2:
            raise
        said = _fault(verb, flags, words) or f"{_flattened(box.getvalue())}: `gam {verb} --help` lists the flags"
        raise InputError(said) from None
    sys.stderr.write(box.getvalue())  # what else was said on the way


def refuse_empty(flags: Sequence[Flag], words: Sequence[str]) -> None:
    """Raise InputError for a flag of any number of values that is given with none: it would do nothing, and say nothing."""
    known = {spelling: flag for flag in flags if not flag.positional for spelling in _spellings(flag)}
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word == "--":
            return
        flag = known.get(word.replace("_", "-"))
        if flag is not None and flag.hint is not bool and _count(flag.hint) is None and (following == "--" or _is_flag(following)):
            raise InputError(f"{word} has no value: give it {_kinds(flag.hint)}, or several")


def _fault(verb: str, flags: Sequence[Flag], words: Sequence[str]) -> str | None:
    """What is wrong: a flag that is unknown, a value that is missing or of another kind, a word too many, or a flag that must be given."""
    known = {spelling: flag for flag in flags if not flag.positional for spelling in _spellings(flag)}
    bare: list[str] = []
    seen: set[str] = set()
    after = ""
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":  # ends the flags
            bare += left
            break
        if not _is_flag(word):
            bare.append(word)
            continue
        name, attached, value = word.partition("=")
        flag = known.get(f"--{name[2:].replace('_', '-')}") if name.startswith("--") else None
        if flag is None:
            return _unknown_flag(verb, name, known)
        seen.add(flag.name)
        after = name
        if flag.hint is bool:
            if attached:
                return f"{name} is {shortened(value)}: it takes no value, write {' or '.join(_spellings(flag))}"
            continue
        values = [value] if attached else []
        count = 1 if flag.appended else _count(flag.hint)
        while left and (count is None or len(values) < count) and left[0] != "--" and not _is_flag(left[0]):
            values.append(left.pop(0))
        if fault := _wrong_values(name, flag.hint, values, count):
            return fault
    return _wrong_words(verb, flags, bare, after) or _missing(flags, seen)


def _unknown_flag(verb: str, name: str, known: Mapping[str, Flag]) -> str:
    bare = name.lstrip("-").replace("_", "-")
    below = [spelling for spelling in known if spelling.rpartition(".")[2] == bare]  # `--write` for `--gam.write`
    near = below or [f"--{each}" for each in difflib.get_close_matches(bare, [spelling[2:] for spelling in known], n=1, cutoff=0.6)]
    hint = f"did you mean {near[0]!r}?" if near else f"`gam {verb} --help-all` lists the flags"
    return f"unknown flag {shortened(name)} of gam {verb}: {hint}"


def _wrong_values(name: str, hint: Any, values: Sequence[str], count: int | None) -> str | None:
    if count is not None and len(values) < count:
        kind = _kinds(hint)
        if not values:
            return f"{name} has no value: give it {kind if count == 1 else f'{count} values, each {kind}'}"
        return f"{name} is {shortened(' '.join(values))}: give it {count} values, each {kind}"
    for value, inner in zip(values, _hints(hint, len(values)), strict=False):
        if not _fits(inner, value):
            return f"{name} is {shortened(value)}: use {_kinds(inner)}"
    return None


def _wrong_words(verb: str, flags: Sequence[Flag], bare: Sequence[str], after: str) -> str | None:
    """What is wrong with the words that no flag takes."""
    places = [flag for flag in flags if flag.positional]
    names = " and ".join(flag.name.upper() for flag in places)
    most = sum(_count(flag.hint) or len(bare) for flag in places)
    if len(bare) <= most:
        return None
    takes = f"takes {names} and flags" if names else "takes flags alone"
    hint = f"{after} has its value already, or takes none" if after else "write a flag as --name value"
    return f"unknown word {shortened(bare[most])}: gam {verb} {takes}; {hint}"


def _missing(flags: Sequence[Flag], seen: set[str]) -> str | None:
    """Which flags must be given, where this was all that could be wrong."""
    absent = [flag for flag in flags if flag.required and flag.name not in seen]
    if not absent:
        return None
    first = absent[0]
    name = first.name.upper() if first.positional else _spellings(first)[0]
    return f"{name} is missing: give it ({first.help.rstrip('.')})"


def _spellings(flag: Flag) -> list[str]:
    """As it is written, and how it is switched off."""
    before, dot, last = flag.name.replace("_", "-").rpartition(".")
    return [f"--{before}{dot}{last}", *([f"--{before}{dot}no-{last}"] if flag.hint is bool else [])]


def _is_flag(word: str) -> bool:
    """Whether the parser takes a word for a flag; -1 and -inf are values."""
    return word.startswith("-") and word.lstrip("-")[:1].isalpha() and not _fits(float, word)


def _unmarked(hint: Any) -> Any:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint


def _branches(hint: Any) -> list[Any]:
    hint = _unmarked(hint)
    return [inner for each in get_args(hint) for inner in _branches(each)] if get_origin(hint) in (Union, types.UnionType) else [hint]


def _count(hint: Any) -> int | None:
    """How many words a flag takes; None for any number."""
    counts = []
    for branch in _branches(hint):
        inner = get_args(branch)
        counts.append((None if Ellipsis in inner else len(inner)) if get_origin(branch) is tuple else 1)
    return None if None in counts else max(count for count in counts if count is not None)


def _hints(hint: Any, number: int) -> list[Any]:
    """Of each of a flag's words."""
    hint = _unmarked(hint)
    if get_origin(hint) is not tuple:
        return [hint]
    inner = get_args(hint)
    return [inner[0]] * number if Ellipsis in inner else list(inner)


def _fits(hint: Any, word: str) -> bool:
    for branch in _branches(hint):
        if branch in (int, float):
            with contextlib.suppress(ValueError):
                branch(word)
                return True
        elif branch is types.NoneType:
            if word == "None":
                return True
        elif get_origin(branch) is Literal:
            if word in map(str, get_args(branch)):
                return True
        else:
            return True
    return False


def _kinds(hint: Any) -> str:
    """What a flag takes, in words."""
    named = {int: "a whole number", float: "a number", types.NoneType: "None", str: "a text"}
    found: list[str] = []
    for branch in _branches(hint):
        if get_origin(branch) is tuple:
            found.append(_kinds(get_args(branch)[0]))
        elif get_origin(branch) is Literal:
            found += map(str, get_args(branch))
        else:
            found.append(named.get(branch, "a path"))
    return " or ".join(sorted(dict.fromkeys(found), key="None".__eq__))  # None comes last


def _flattened(box: str) -> str:
    """The first part of a box without its frame."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines() if not line.startswith("╭")]
    first = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    return " ".join(" ".join(lines[:first]).split()).rstrip(".") or "the flags cannot be read"
