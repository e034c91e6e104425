"""One file of the user's text, read document by document: plain text, jsonl and parquet, also packed with gzip or zstd.

* A document is a whole text file, a row of a .jsonl, or a row of a .parquet. A text of more than 16 million characters is several.
* ``<|endoftext|>`` in a text ends a document, as in the files of GPT-2's data and of TinyStories. It becomes the token of that name.
* CRLF becomes LF in text files, and a byte order mark is dropped. Nothing else is changed.
* Rows whose text is null and documents of white space alone are left out and counted.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gam_lm.data import parquet
from gam_lm.data.left_out import BLANK, NULL, LeftOut, printable
from gam_lm.data.packed import PACKED, unpacked
from gam_lm.errors import InputError

PLAIN = (".txt", ".md", ".py", ".raw")
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")

END_OF_TEXT = "<|endoftext|>"
"""Ends a document, in a text and among the ids."""

BYTES_AT_ONCE = 1 << 22

PART_CHARACTERS = 16_000_000
"""A longer text file is read in parts of about this length, each a document of whole lines: bounds the memory."""

MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""Byte order marks, the longer first: UTF-32's begins like UTF-16's."""


def kind(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of a packed file and in small letters; None for a file that is not read."""
    name = path.name.lower()
    packed = name.endswith(PACKED)
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    found = Path(name).suffix
    return found if found in SUFFIXES and not (packed and found == ".parquet") else None


def read(path: Path, left_out: LeftOut | None = None) -> Iterator[str]:
    """The documents of one file.

    Args:
        path: of a file whose `kind` is known.
        left_out: where rows without text and blank documents are counted.

    Raises:
        InputError: naming the file, and the line or byte where it is broken.
    """
    left_out = left_out or LeftOut()
    nulls = blanks = 0
    for text in _texts(path):
        if text is None:
            nulls += 1
        elif text.isspace():
            blanks += 1
        elif text:
            yield text
    left_out.documents(path, NULL, nulls)
    left_out.documents(path, BLANK, blanks)


def _texts(path: Path) -> Iterator[str | None]:
    """Texts between separators; None for a row without text."""
    found = kind(path)
    if found in PLAIN:
        yield from _split_at_separators(_decoded(path))
        return
    for text in _jsonl(path) if found == ".jsonl" else parquet.texts(path):
        if text is None:
            yield None
        elif END_OF_TEXT in text:
            yield from text.split(END_OF_TEXT)
        else:
            yield text


def _split_at_separators(chunks: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    characters, limit = 0, PART_CHARACTERS
    tail = ""  # may hold the beginning of a separator
    for chunk in chunks:
        *ended, rest = (tail + chunk).split(END_OF_TEXT)
        for text in ended:
            yield "".join([*held, text])
            held, characters, limit = [], 0, PART_CHARACTERS
        border = max(0, len(rest) - len(END_OF_TEXT) + 1)
        held.append(rest[:border])
        characters += border
        tail = rest[border:]
        if characters >= limit:
            part = "".join(held)
            end = part.rfind("\n") + 1 or part.rfind(" ") + 1
            if end:
                yield part[:end]
                held, characters, limit = [part[end:]], len(part) - end, PART_CHARACTERS
            else:
                held, limit = [part], 2 * limit  # a place to cut may come
    yield "".join([*held, tail])


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in chunks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0
    carriage_return = ""  # at the end of a chunk: the next may begin with its line feed
    with unpacked(path) as file:
        while True:
            raw = file.read(BYTES_AT_ONCE)
            if place == 0:
                _check_marks(path, raw)
                if raw.startswith(codecs.BOM_UTF8):
                    place, raw = len(codecs.BOM_UTF8), raw[len(codecs.BOM_UTF8) :]
            if (at := raw.find(b"\0")) >= 0:
                raise InputError(f"data {str(path)!r} is binary (a NUL byte at byte {place + at}){_guess(raw)}: use a UTF-8 text file")
            waiting = len(decoder.getstate()[0])
            try:
                text = carriage_return + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise InputError(f"data {str(path)!r} is not UTF-8 (byte {place - waiting + error.start}): convert it to UTF-8") from error
            place += len(raw)
            carriage_return = "\r" if raw and text.endswith("\r") else ""
            yield text.removesuffix(carriage_return).replace("\r\n", "\n")
            if not raw:
                return


def _check_marks(path: Path, raw: bytes) -> None:
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            raise InputError(f"data {str(path)!r} is {encoding}: convert it to UTF-8 (iconv -f {encoding} -t UTF-8)")


def _guess(raw: bytes) -> str:
    """Latin text in UTF-16 without a mark has a NUL in every second byte."""
    start = raw[:1000]
    return ", perhaps UTF-16" if start[::2].count(0) > 0.4 * len(start) / 2 or start[1::2].count(0) > 0.4 * len(start) / 2 else ""


def _jsonl(path: Path) -> Iterator[str | None]:
    """The field called text of each row, or the only one that can hold text. A row that has no such field is an error, null is not."""
    column: str | None = None
    with unpacked(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                _check_marks(path, raw)
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            where = f"data {str(path)!r}, line {number}"
            row = _row(raw, where)
            if column is None:
                column = _field(row, where)
            if column not in row:
                raise InputError(f"{where}: the row has no field {column!r} as the rows before it have: give every row a text, or null")
            if column != "text" and "text" in row:
                raise InputError(f"{where}: the row has a field 'text', which the rows before it do not have: call the text 'text' in all of them")
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise InputError(f"{where}: field {column!r} holds no text but {_json_kind(value)}: put the text itself there")
            if value is not None and not _is_unicode(value):
                raise InputError(f"{where}: field {column!r} holds half of a surrogate pair, which is no character: remove it")
            yield value


def _row(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 (byte {error.start} of the line): convert the file to UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{where}: no JSON that can be read (nested too deeply): use an object with a text field") from error
    except ValueError as error:
        raise InputError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: no JSON object, use one with a text field")
    return row


def _field(row: dict[str, Any], where: str) -> str:
    """The field that holds the text; null may stand for a text."""
    if "text" in row:
        return "text"
    possible = [key for key, value in row.items() if value is None or isinstance(value, str)]
    if len(possible) != 1:
        names = ", ".join(map(printable, row)) or "no fields"
        raise InputError(f"{where.partition(', line')[0]} has the columns {names}: call the one with the text 'text'")
    return possible[0]


def _json_kind(value: Any) -> str:
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a number")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
