"""Where text comes from: a corpus by name, or a path."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gam_lm.data import stdlib
from gam_lm.data.left_out import LeftOut
from gam_lm.errors import InputError, unknown_name

logger = logging.getLogger("gam_lm")

Documents = Callable[[], Iterator[str]]
"""Iterates the documents of a split anew at each call, holding one at a time."""

SPLITS = ("train", "valid", "test")

CORPUS_NAMES = (
    "stdlib", "gutenberg", "books", "wikitext-2", "wikitext-2-v1", "wikitext-103", "tinystories", "tinystories-sample", "tinyshakespeare", "lambada",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Named text, split into train, valid and test; not all corpora have all three."""

    name: str
    splits: Mapping[str, Documents]
    stamp: str
    """Changes whenever the text may have changed, and costs nothing to find: what prepared ids are found again by."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """About how many bytes a split has, where that is known before it is read: what progress is counted against."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What is not used of the user's files; documents are counted as they are read."""

    def limited(self, row_limits: Mapping[str, int] | None) -> Corpus:
        """The same corpus with at most so many documents per split."""
        if not row_limits:
            return self
        limited = {name: _first(documents, row_limits.get(name)) for name, documents in self.splits.items()}
        return Corpus(self.name, limited, f"{self.stamp} {sorted(row_limits.items())}", left_out=self.left_out)


def load_corpus(data: str | Sequence[str], *, rows: bool = False) -> Corpus:
    """The corpus called ``data``, or the one at that path.

    Args:
        data: one of CORPUS_NAMES, or the path of a .txt, .md, .py, .jsonl (also as .gz and .zst) or .parquet file or of a folder; several paths are
            one text.
        rows: whether a document of a hub corpus is a row of its data set, as the paper's protocol takes it, rather than an article.

    Raises:
        InputError: where there is no such corpus or path, or its text cannot be read.
    """
    if not isinstance(data, str):
        if len(data) > 1:
            return _at_paths(data)
        [data] = data
    if data in CORPUS_NAMES and os.path.lexists(data):
        logger.info("data %s is the corpus of that name, not what is in this folder: for that write ./%s", data, data)
    if data == "stdlib":
        return Corpus(data, stdlib.splits(), stdlib.stamp())
    if data == "gutenberg":
        from gam_lm.data import gutenberg

        return Corpus(data, gutenberg.splits(), gutenberg.stamp(), gutenberg.sizes())
    if data == "books":
        from gam_lm.data import books

        return Corpus(data, books.splits(), books.stamp(), books.sizes())
    if data in ("tinystories-sample", "tinyshakespeare", "lambada"):
        from gam_lm.data import named_texts

        return Corpus(data, named_texts.splits(data), named_texts.stamp(data))
    if data in CORPUS_NAMES:
        from gam_lm.data import hub

        return Corpus(data, hub.splits(data, rows=rows), hub.stamp(data, rows=rows))
    return _at_path(data)


def _at_path(data: str) -> Corpus:
    from gam_lm.data import folders

    if "\0" in data:
        raise InputError(f"data is {data!r}: a path holds no NUL character")
    path = Path(data).expanduser()
    if os.sep not in data and not path.suffix and not os.path.lexists(path):
        raise unknown_name("data", data, CORPUS_NAMES)
    left_out = LeftOut()
    splits = folders.splits(path, left_out)
    return Corpus(path.resolve().stem or "data", splits, folders.stamp(path), folders.sizes(path, splits), left_out)


def _at_paths(several: Sequence[str]) -> Corpus:
    """The files at several paths, split together."""
    from gam_lm.data import folders

    if named := [each for each in several if each in CORPUS_NAMES]:
        raise InputError(f"data is {named[0]!r} and more: give one corpus by its name, or paths")
    left_out = LeftOut()
    paths = [Path(each).expanduser() for each in several]
    files = list(dict.fromkeys(file.resolve() for path in paths for file in folders.find(path, left_out)))
    splits = folders.split_files(files, left_out)
    stamp = repr([folders.stamp(path) for path in paths])
    return Corpus(f"{paths[0].resolve().stem}-and-{len(paths) - 1}-more", splits, stamp, folders.sizes_of_files(files, splits), left_out)


def _first(documents: Documents, limit: int | None) -> Documents:
    return documents if limit is None else lambda: islice(documents(), limit)
