"""74 public-domain books in English: 66 train, 4 valid, 4 test.

gutenberg.csv beside this file gives each book's name, split, Project Gutenberg number, title, bytes and checksum after cleaning.
The cleaning rule: CRLF becomes LF; everything up to the line that starts ``*** START OF`` and from the line that starts ``*** END OF`` on is
cut; white space at both ends is stripped.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gam_lm.errors import InputError
from gam_lm.runtime.files import replacing

logger = logging.getLogger("gam_lm")

SOURCE = "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"
SECONDS = 60


@dataclass(frozen=True)
class Book:
    """A row of the index."""

    name: str
    split: str
    number: int
    sha256: str


def index() -> list[Book]:
    """All books, in the order of the index."""
    text = files("gam_lm.data").joinpath("gutenberg.csv").read_text(encoding="utf-8")
    return [Book(row["name"], row["split"], int(row["ebook_number"]), row["sha256"]) for row in csv.DictReader(text.splitlines())]


def stamp() -> str:
    """The checksums of all books."""
    return repr([(book.split, book.sha256) for book in index()])


def splits() -> Mapping[str, Callable[[], Iterator[str]]]:
    """The books of each split, one a document; a book is read, or fetched, when its turn comes."""
    books = index()
    return {split: (lambda split=split: (read(book) for book in books if book.split == split)) for split in ("train", "valid", "test")}  # type: ignore[misc]


def read(book: Book, source: str = SOURCE) -> str:
    """A book's text: from $GAM_DATA/gutenberg where it is there, else from the cache, else downloaded into it.

    Raises:
        InputError: where the checksum differs, or the book cannot be downloaded.
    """
    from gam_lm.data.corpora import cache_root, data_root

    place = Path("gutenberg", book.split, f"{book.name}.txt")
    for root in (data_root(), cache_root()):
        if root is not None and (root / place).is_file():
            raw = (root / place).read_bytes()
            _check(raw, book, str(root / place))
            return raw.decode("utf-8")
    raw = clean(_download(book, source)).encode()
    _check(raw, book, source.format(number=book.number))
    with replacing(cache_root() / place) as temporary:
        temporary.write_bytes(raw)
    return raw.decode()


def clean(text: str) -> str:
    """The cleaning rule of the module docstring."""
    lines = text.replace("\r\n", "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("*** START OF")]
    ends = [i for i, line in enumerate(lines) if line.startswith("*** END OF")]
    return "\n".join(lines[starts[0] + 1 if starts else 0 : ends[-1] if ends else len(lines)]).strip()


def _download(book: Book, source: str) -> str:
    url = source.format(number=book.number)
    logger.info("downloading %s from %s", book.name, url)
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return answer.read().decode("utf-8-sig")
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"gutenberg: {book.name} cannot be downloaded from {url} ({error}): run `gam data prepare gutenberg` on a machine that is online and copy "
            "its cache folder gam-lm/gutenberg here, or set GAM_DATA to the folder that holds gutenberg/"
        ) from error


def _check(raw: bytes, book: Book, where: str) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != book.sha256:
        raise InputError(
            f"gutenberg: {where} has the checksum {found[:12]}…, the index says {book.sha256[:12]}…: remove the file, or fetch that edition"
        )
