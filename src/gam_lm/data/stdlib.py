"""Real prose that every Python carries: the language reference that pydoc shows, and the docstrings of the standard library.

About 2 MB, offline, the same for one Python version. Everything is read with ``ast`` and nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "turtledemo", "ensurepip"})
"""Folders with other people's code, fixtures, or no prose."""

PARTS = 20
"""One document in this many is for validation, and one for test."""


def splits() -> Mapping[str, Callable[[], Iterator[str]]]:
    """The documents of train, valid and test: which one a document is in depends on its own text alone."""
    return {name: (lambda name=name: iter(_by_split()[name])) for name in ("train", "valid", "test")}  # type: ignore[misc]


def stamp() -> str:
    """The version of Python and the sizes of the files that are read."""
    return repr((sys.version, [(name, path.stat().st_size) for name, path in _modules()]))


@lru_cache(maxsize=1)
def _by_split() -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for document in (*_topics(), *_docstrings()):
        if document in seen:
            continue
        seen.add(document)
        part = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") % PARTS
        found["valid" if part == 0 else "test" if part == 1 else "train"].append(document)
    return {name: tuple(documents) for name, documents in found.items()}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> list[tuple[str, Path]]:
    """Every module of the library with its name from the library's root, in the order of the names."""
    library = _library()
    named = ((path.relative_to(library), path) for path in library.rglob("*.py"))
    return sorted((name.as_posix(), path) for name, path in named if not SKIPPED.intersection(name.parts[:-1]))


def _topics() -> Iterator[str]:
    """The values of the dictionary in pydoc_data/topics.py."""
    path = _library() / "pydoc_data" / "topics.py"
    if not path.is_file():  # some distributions leave it out
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            yield from (ast.literal_eval(value).strip() for value in node.values)


def _docstrings() -> Iterator[str]:
    """One document per module: its docstrings, in the order of its lines, each once in all the library."""
    seen: set[str] = set()
    for _, path in _modules():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other people's escape sequences
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and fixtures that are not Python of this version
        parts = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text not in seen:
                    seen.add(text)
                    parts.append((getattr(node, "lineno", 0), text.strip()))
        if parts:
            yield "\n\n".join(text for _, text in sorted(parts, key=lambda part: part[0]))
