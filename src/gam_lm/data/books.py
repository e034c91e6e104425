"""882 public-domain books in English as the training text (432 MB), with the validation and test books of ``gutenberg``.

The text is the 66 training books of ``gutenberg`` and 816 more from the GitHub repositories mlschmitt/classic-books-markdown,
computationalstylistics/100_english_novels and COST-ELTeC/ELTeC-eng, in random order, in nine parquet files with the columns ``source`` and
``text``. books.csv beside this file gives each book's shard, source, bytes, words and checksum. Every book is checked as it is read.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from gam_lm.data import gutenberg, parquet
from gam_lm.data.places import data_root
from gam_lm.errors import InputError


@dataclass(frozen=True)
class Book:
    """A row of the index."""

    shard: str
    source: str
    bytes: int
    sha256: str


@lru_cache(maxsize=1)
def index() -> tuple[Book, ...]:
    """All training books, in the order in which the shards hold them."""
    text = files("gam_lm.data").joinpath("books.csv").read_text(encoding="utf-8")
    return tuple(Book(row["shard"], row["source"], int(row["bytes"]), row["sha256"]) for row in csv.DictReader(text.splitlines()))


def stamp() -> str:
    """The checksums of all books, those of validation and test included."""
    return hashlib.sha256(repr([book.sha256 for book in index()]).encode()).hexdigest() + gutenberg.stamp()


def sizes() -> Mapping[str, int]:
    """Bytes of each split."""
    return {**gutenberg.sizes(), "train": sum(book.bytes for book in index())}


def splits() -> Mapping[str, Callable[[], Iterator[str]]]:
    """The books of each split, one a document, read when their turn comes.

    Raises:
        InputError: where the shards are not under $GAM_DATA/books.
    """
    folder = _folder()
    return {**gutenberg.splits(), "train": lambda: read(folder, index())}


def read(folder: Path, books: tuple[Book, ...]) -> Iterator[str]:
    """The texts of ``books`` from the shards in ``folder``, which hold exactly these books in this order.

    Raises:
        InputError: naming the shard, where it is missing or broken, or the book whose source or checksum differs from the index.
    """
    expected = iter(books)
    for shard in dict.fromkeys(book.shard for book in books):
        path = folder / shard
        if not path.is_file():
            raise InputError(f"books: {path} is missing: copy the folder with all nine parquet files again")
        count = sum(book.shard == shard for book in books)
        for source, text in parquet.rows(path, ("source", "text")):
            book = next(expected, None)
            if book is None or book.shard != shard or not isinstance(text, str) or source != book.source:
                raise InputError(f"books: {path} holds {source!r} where the index has {book and book.source!r}: copy the file again")
            found = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            if found != book.sha256:
                raise InputError(f"books: {source} in {path} has the checksum {found[:12]}…, the index says {book.sha256[:12]}…: copy the file again")
            count -= 1
            yield text
        if count:
            raise InputError(f"books: {path} lacks {count} of its books: copy the file again")


def _folder() -> Path:
    root = data_root()
    folder = Path("$GAM_DATA", "books", "train") if root is None else root / "books" / "train"
    if not folder.is_dir():
        raise InputError(
            f"data 'books' is not at hand: {folder} does not exist; put the nine parquet files there and set GAM_DATA, or use gutenberg, which is downloaded"
        )
    return folder
