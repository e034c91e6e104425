"""Corpora from the Hugging Face Hub: WikiText-2 and WikiText-103 as published, WikiText-2 with rare words as <unk>, TinyStories.

``wikitext-2`` is the raw text. ``wikitext-2-v1`` is the word-level version: words that are rare in its training split read ``<unk>``, so that
its perplexities cannot be compared with those of the raw text.

A local copy under $GAM_DATA is used where there is one: a folder with the corpus's name (or wikitext-2-raw, as the original archive calls it)
that holds train, valid and test as .parquet, .txt or .raw files. Else the ``datasets`` library fetches it once into its own cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gam_lm.data import folders, parquet, text_files
from gam_lm.data.places import data_root
from gam_lm.errors import InputError, MissingExtraError

Documents = Callable[[], Iterator[str]]

HEADING = re.compile(r"^ = [^=].*[^=] = ?$")
"""A line that may open an article of WikiText; sections have more equals signs."""


@dataclass(frozen=True)
class Source:
    """Where a corpus is on the Hub."""

    repository: str
    configuration: str | None
    articles: bool
    """Whether rows are lines of articles, rather than documents."""


SOURCES = {
    "wikitext-2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", True),
    "wikitext-2-v1": Source("Salesforce/wikitext", "wikitext-2-v1", True),
    "wikitext-103": Source("Salesforce/wikitext", "wikitext-103-raw-v1", True),
    "tinystories": Source("roneneldan/TinyStories", None, False),
}

HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def splits(name: str, *, rows: bool) -> Mapping[str, Documents]:
    """The splits of a corpus of the Hub.

    Args:
        name: a key of SOURCES.
        rows: whether a document is a row, as in the paper's protocol, rather than an article.

    Raises:
        InputError: where it is neither at hand nor to be fetched.
    """
    source = SOURCES[name]
    local = local_copy(name)
    found = _local_rows(name, local) if local is not None else load_rows(name, source.repository, source.configuration)
    if rows:
        return found
    joined = _articles_of if source.articles else _without_blank_rows
    return {split: joined(documents) for split, documents in found.items()}


def stamp(name: str, *, rows: bool) -> str:
    """The files of a local copy; the Hub's own data sets do not change."""
    local = local_copy(name)
    return f"{SOURCES[name]} rows={rows} {folders.stamp(local) if local is not None else 'hub'}"


def local_copy(name: str) -> Path | None:
    """The folder under $GAM_DATA that holds the corpus, or None."""
    root = data_root()
    for folder in (name, f"{name}-raw"):
        if root is not None and (root / folder).is_dir():
            return root / folder
    return None


def load_rows(name: str, repository: str, configuration: str | None = None) -> Mapping[str, Documents]:
    """The rows of every split, through ``datasets``; ``repository`` may be a local folder in the Hub's own layout.

    Raises:
        InputError: where it cannot be reached and is not in the cache.
        MissingExtraError: where ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"data {name!r}") from error
    try:
        loaded = datasets.load_dataset(repository, configuration)
    except (ConnectionError, OSError, ValueError) as error:
        cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        raise InputError(
            f"data {name!r} is not in the cache and the Hub cannot be reached ({str(error).splitlines()[0][:120]}): run `gam data prepare {name}` on a machine "
            f"that is online and copy its folder {cache} here, or put the files under $GAM_DATA/{name}"
        ) from error
    return {split: _column(loaded[theirs]) for split, theirs in HUB_SPLITS.items() if theirs in loaded}


def _local_rows(name: str, folder: Path) -> Mapping[str, Documents]:
    """Rows of a local copy: those of a parquet file, or the lines of a text file as the Hub has them: with their ends, blank lines empty."""
    parts = folders.files_by_split(folder, folders.find(folder))
    found = {split: _rows(paths, lines=SOURCES[name].articles) for split, paths in parts.items()}
    for split in ("train", "valid"):
        if split not in found:
            raise InputError(f"data {name!r}: {folder} has no file of the {split} split, put one there or unset GAM_DATA")
    return found


def _rows(paths: list[Path], *, lines: bool) -> Documents:
    """Rows of data files; of text files their lines, or the texts between separators."""

    def rows() -> Iterator[str]:
        for path in paths:
            if text_files.kind(path) == ".parquet":
                yield from (text or "" for text in parquet.texts(path))
            else:
                for document in text_files.read(path):
                    yield from _rows_of(document) if lines and text_files.kind(path) != ".jsonl" else [document]

    return rows


def _rows_of(text: str) -> Iterator[str]:
    """The lines of a text, which end at line feeds alone: WikiText holds other characters that ``str.splitlines`` takes for ends."""
    lines = text.split("\n")
    ended = len(lines) - 1
    for i, line in enumerate(lines):
        if i < ended or line:
            yield (line + "\n" if i < ended else line) if line.strip() else ""


def _column(split: Any) -> Documents:
    return lambda: (row["text"] or "" for row in split)


def _articles_of(rows: Documents) -> Documents:
    return lambda: articles(rows())


def _without_blank_rows(rows: Documents) -> Documents:
    return lambda: (row for row in rows() if row.strip())


def articles(rows: Iterator[str]) -> Iterator[str]:
    """Join the rows of WikiText into articles, which start at a heading of the first level between two blank rows.

    Lines between other lines may look like such a heading: the keys of tables do.
    """
    held: list[str] = []
    for before, row, after in _with_neighbours(rows):
        if not before.strip() and not after.strip() and HEADING.match(row.rstrip("\n")) and any(line.strip() for line in held):
            yield "".join(held)
            held = []
        held.append(row)
    if any(line.strip() for line in held):
        yield "".join(held)


def _with_neighbours(rows: Iterator[str]) -> Iterator[tuple[str, str, str]]:
    before, row = "", next(rows, None)
    while row is not None:
        after = next(rows, None)
        yield before, row, after or ""
        before, row = row, after
