"""74 public-domain books in English: 66 train, 4 valid, 4 test.

gutenberg.csv beside this file gives each book's name, split, Project Gutenberg number, title, bytes and checksum after cleaning.
The cleaning rule: CRLF becomes LF; everything up to the line that starts ``*** START OF`` and from the line that starts ``*** END OF`` on is
cut; white space at both ends is stripped.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gam_lm.data.download import check, fetch
from gam_lm.data.places import cache_root, data_root

SOURCE = "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"


@dataclass(frozen=True)
class Book:
    """A row of the index."""

    name: str
    split: str
    number: int
    bytes: int
    sha256: str


def index() -> list[Book]:
    """All books, in the order of the index."""
    text = files("gam_lm.data").joinpath("gutenberg.csv").read_text(encoding="utf-8")
    return [Book(row["name"], row["split"], int(row["ebook_number"]), int(row["bytes"]), row["sha256"]) for row in csv.DictReader(text.splitlines())]


def stamp() -> str:
    """The checksums of all books."""
    return repr([(book.split, book.sha256) for book in index()])


def sizes() -> Mapping[str, int]:
    """Bytes of each split."""
    return {split: sum(book.bytes for book in index() if book.split == split) for split in ("train", "valid", "test")}


def splits() -> Mapping[str, Callable[[], Iterator[str]]]:
    """The books of each split, one a document; a book is read, or fetched, when its turn comes."""
    books = index()
    return {split: (lambda split=split: (read(book) for book in books if book.split == split)) for split in ("train", "valid", "test")}  # type: ignore[misc]


def read(book: Book, source: str = SOURCE) -> str:
    """A book's text: from $GAM_DATA/gutenberg where it is there, else from the cache, else downloaded into it.

    Raises:
        InputError: where the checksum differs, or the book cannot be downloaded.
    """
    place = Path("gutenberg", book.split, f"{book.name}.txt")
    what = f"gutenberg: {book.name}"
    for root in (data_root(), cache_root()):
        if root is not None and (root / place).is_file():
            raw = (root / place).read_bytes()
            check(raw, book.sha256, what, str(root / place))
            return raw.decode("utf-8")
    url = source.format(number=book.number)
    return fetch(url, cache_root() / place, book.sha256, what, lambda raw: clean(raw.decode("utf-8-sig")).encode()).decode()


def clean(text: str) -> str:
    """The cleaning rule of the module docstring."""
    lines = text.replace("\r\n", "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("*** START OF")]
    ends = [i for i, line in enumerate(lines) if line.startswith("*** END OF")]
    return "\n".join(lines[starts[0] + 1 if starts else 0 : ends[-1] if ends else len(lines)]).strip()
