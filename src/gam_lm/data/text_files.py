"""The user's own text: .txt, .md, .py, .jsonl and .parquet files, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gam_lm.errors import InputError, MissingExtraError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet", ".raw")

SPLIT_NAMES = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}

FEW_DOCUMENTS = 20
"""With fewer, a split by document would be lopsided, and the text is split by blocks."""

BLOCK_CHARACTERS = 4096

Documents = Callable[[], Iterator[str]]


def splits(path: Path) -> Mapping[str, Documents]:
    """The splits of a file or folder.

    A folder with files or folders called train, valid (or validation, val, dev) and test is split as it says. Everything else is one
    source, of which each twentieth document is for validation and the next for test, or each twentieth block of 4,096 characters where there are
    fewer than 20 documents.

    Raises:
        InputError: for a path with no readable file, a broken or binary file, or no text.
    """
    if path.is_dir():
        named = {split: part for split, names in SPLIT_NAMES.items() if (part := _named_part(path, names)) is not None}
        if "train" in named:
            return {**{split: _reader(found) for split, found in named.items()}, **_validation_of(named)}
    return _split_one(_reader(find(path)))


def stamp(path: Path) -> str:
    """Names, sizes and times of the files at ``path``."""
    return repr([(str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns) for each in find(path)])


def find(path: Path) -> list[Path]:
    """The readable files at ``path``, in the order of their names. Raises InputError where there is none."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"data is {str(path)!r}, of a kind that cannot be read: use {' '.join(SUFFIXES)}")
        return [path]
    if not path.exists():
        raise InputError(f"data is {str(path)!r}: there is no such file or folder")
    found = sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in SUFFIXES)
    if not found:
        raise InputError(f"data is {str(path)!r}, a folder with no file of {' '.join(SUFFIXES)}")
    return found


def read(path: Path) -> Iterator[str]:
    """The documents of one file: lines of a .jsonl, rows of a .parquet, else the whole file.

    Raises:
        InputError: naming the file, and the line or byte where it is broken.
    """
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        yield _text(path)


def _named_part(folder: Path, names: tuple[str, ...]) -> list[Path] | None:
    """Files of one split: a folder of that name, or files whose stem begins or ends with it (train.txt, train-00000-of-00001.parquet, wiki.train.raw)."""
    for name in names:
        if (folder / name).is_dir():
            return find(folder / name)
    found = [each for each in sorted(folder.iterdir()) if each.is_file() and each.suffix in SUFFIXES and names_split(each, names)]
    return found or None


def names_split(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a file's name says that it belongs to the split called one of ``names``."""
    words = path.stem.replace("-", ".").replace("_", ".").split(".")
    return words[0] in names or words[-1] in names


def _validation_of(named: Mapping[str, list[Path]]) -> Mapping[str, Documents]:
    """A validation split taken from train where the folder has none."""
    if "valid" in named:
        return {}
    own = _split_one(_reader(named["train"]))
    return {"train": own["train"], "valid": own["valid"]}


def _reader(paths: list[Path]) -> Documents:
    return lambda: (document for path in paths for document in read(path) if document.strip())


def _split_one(documents: Documents) -> Mapping[str, Documents]:
    few = sum(1 for _ in islice(documents(), FEW_DOCUMENTS)) < FEW_DOCUMENTS
    pieces = (lambda: _blocks(documents())) if few else documents
    places: dict[str, tuple[int, ...]] = {"valid": (FEW_DOCUMENTS // 2,), "test": (FEW_DOCUMENTS // 2 + 1,)}
    places["train"] = tuple(set(range(FEW_DOCUMENTS)) - {*places["valid"], *places["test"]})

    def part(split: str) -> Documents:
        return lambda: (piece for i, piece in enumerate(pieces()) if i % FEW_DOCUMENTS in places[split])

    return {split: part(split) for split in ("train", "valid", "test")}


def _blocks(documents: Iterator[str]) -> Iterator[str]:
    """Pieces of whole lines of at least 4,096 characters; of fewer where the text is short, so that each split has some."""
    text = list(documents)
    size = min(BLOCK_CHARACTERS, max(1, sum(map(len, text)) // (3 * FEW_DOCUMENTS)))
    for document in text:
        held: list[str] = []
        count = 0
        for line in document.splitlines(keepends=True):
            held.append(line)
            count += len(line)
            if count >= size:
                yield "".join(held)
                held, count = [], 0
        if held:
            yield "".join(held)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"data {str(path)!r} cannot be read: {error.strerror}") from error
    if (place := raw.find(b"\0")) >= 0:
        raise InputError(f"data {str(path)!r} is binary (a NUL byte at byte {place}): use a UTF-8 text file")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"data {str(path)!r} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error


def _jsonl(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            column = None
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"data {str(path)!r}, line {number}: no JSON ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(f"data {str(path)!r}, line {number}: no JSON object, use one with a text field")
                column = column or _text_column(path, [key for key, value in row.items() if isinstance(value, str)], list(row))
                value = row.get(column)
                if not isinstance(value, str):
                    raise InputError(f"data {str(path)!r}, line {number}: field {column!r} holds no text")
                yield value
    except UnicodeDecodeError as error:
        raise InputError(f"data {str(path)!r} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"data {str(path)!r}") from error
    try:
        with pq.ParquetFile(path) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            strings = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
            column = _text_column(path, strings, list(kinds))
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (value.as_py() or "" for value in batch.column(0))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data {str(path)!r} is a broken parquet file ({str(error).splitlines()[0]})") from error


def _text_column(path: Path, strings: list[str], everything: list[Any]) -> str:
    """The column called text, else the only one of strings."""
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise InputError(f"data {str(path)!r} has the columns {', '.join(map(str, everything))}: call the one with the text 'text'")
    return strings[0]
