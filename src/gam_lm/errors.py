"""One kind of error for everything that a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The user's input cannot be used.

    The message is one line that names the field, its value and the fix. The command line prints it and exits with 2; it never
    shows a traceback. (No ValueError: the parser of flags would take that for its own and print a box around it.)
    """


class MissingExtraError(InputError):
    """An optional package is not installed; the message carries the pip command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'gam-lm[{extra}]'")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error for a name that is not in ``known``, with the nearest one that is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
    return InputError(f"unknown {kind} {name!r}: {hint}")
