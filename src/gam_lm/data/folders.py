"""The user's own text: which files of a path are read, and how they become train, valid and test."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, count, groupby, islice
from pathlib import Path

from gam_lm.data.left_out import HIDDEN, LOOP, NO_SPLIT, OTHER_KIND, TWICE, UNREADABLE, LeftOut
from gam_lm.data.packed import PACKED
from gam_lm.data.pieces import cut
from gam_lm.data.text_files import SUFFIXES, kind, read
from gam_lm.errors import InputError

SPLIT_NAMES = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}

PARTS = 20
"""One document in this many is for validation, and one for test. With fewer documents the text is split by blocks."""

PLACES = {"valid": PARTS // 2, "test": PARTS // 2 + 1}

BLOCK_CHARACTERS = 4096

Documents = Callable[[], Iterator[str]]


def splits(path: Path, left_out: LeftOut | None = None) -> Mapping[str, Documents]:
    """The splits of a file or folder.

    A folder is split as its files' names say where its parts called train, valid (or validation, val, dev) and test hold at least half of its bytes:
    folders of these names, or files whose name begins or ends with one of these words. The other files are left out then. Everything else is one source: each
    twentieth document is for validation and the next for test, or each twentieth block of 4,096 characters where there are fewer than
    20 documents. Neighbouring blocks of one split stay one document.

    Args:
        path: of a file or folder; links are followed.
        left_out: where everything that is not used is noted.

    Raises:
        InputError: for a path with no readable file, a broken or binary file, or no text.
    """
    left_out = left_out or LeftOut()
    files = find(path, left_out)
    parts = _named_parts(path, files) if path.is_dir() else {}
    if not parts:
        return split_files(files, left_out)
    for file in files:
        if not any(file in part for part in parts.values()):
            left_out.file(file, NO_SPLIT)
    found = {split: _reader(part, left_out) for split, part in parts.items()}
    if "valid" not in found:
        found |= _split_one(found["train"], left_out, {split: place for split, place in PLACES.items() if split not in found})
    return found


def split_files(files: Sequence[Path], left_out: LeftOut) -> Mapping[str, Documents]:
    """The splits of files that are one text, whatever their names say; as those of `splits`."""
    return _split_one(_reader(files, left_out), left_out)


def stamp(path: Path) -> str:
    """Names, sizes and times of the files at ``path``."""
    return repr([(str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns) for each in find(path)])


def sizes(path: Path, names: Collection[str]) -> Mapping[str, int]:
    """About how many bytes each split at ``path`` has, from the sizes of the files; nothing where files are packed or the names say nothing."""
    files = find(path)
    parts = _named_parts(path, files) if path.is_dir() else {}
    if parts and not _packed(files):
        return {split: sum(file.stat().st_size for file in part) for split, part in parts.items()}
    return sizes_of_files(files, names)


def sizes_of_files(files: Sequence[Path], names: Collection[str]) -> Mapping[str, int]:
    """`sizes` of files that `split_files` splits."""
    if _packed(files):
        return {}
    total = sum(file.stat().st_size for file in files)
    return {name: total * (PARTS - len(PLACES) if name == "train" else 1) // PARTS for name in names}


def _packed(files: Sequence[Path]) -> bool:
    return any(file.suffix.lower() in (*PACKED, ".parquet") for file in files)


def find(path: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The files at ``path`` that are read, in the order of their names; what is not is noted in ``left_out``. Raises InputError where there is none."""
    left_out = left_out or LeftOut()
    known = f"{' '.join(SUFFIXES)}, also as {' '.join(PACKED)}"
    try:
        if path.is_file():
            if kind(path) is None:
                raise InputError(f"data is {str(path)!r}, of a kind that cannot be read: use {known}")
            return [path]
        if not path.exists():
            raise InputError(f"data is {str(path)!r}: there is no such file or folder")
        if not path.is_dir():
            raise InputError(f"data is {str(path)!r}, which is neither a file nor a folder: use a file of {known}")
    except OSError as error:
        raise InputError(f"data is {str(path)!r}, which cannot be opened: {error.strerror}") from error
    found = sorted(_walk(path, left_out))
    if not found:
        reasons = "".join(f"; {line}" for line in left_out.in_files())
        raise InputError(f"data is {str(path)!r}, a folder with no file of {known}{reasons}")
    return found


def files_by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files below ``folder`` that names put into a split, by split; a split without any is left out.

    A folder called as a split holds it, the outermost such folder of a path. Where no folder does, the files' names say it: they begin or end with the split's
    name (train.txt, train-00000-of-00001.parquet, wiki.train.raw). A name that says two splits (train_dev.txt) says none.
    """
    by_folder: dict[str, list[Path]] = {}
    by_name: dict[str, list[Path]] = {}
    for file in files:
        above = (split for part in file.relative_to(folder).parts[:-1] if (split := _split_called(part.lower())) is not None)
        if (split := next(above, None)) is not None:
            by_folder.setdefault(split, []).append(file)
        elif len(said := _splits_in_name(file)) == 1:
            by_name.setdefault(said.pop(), []).append(file)
    return {split: found for split in SPLIT_NAMES if (found := by_folder.get(split) or by_name.get(split))}


def _split_called(word: str) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def _splits_in_name(path: Path) -> set[str]:
    name = path.name.lower()
    for suffix in (*PACKED, *SUFFIXES):
        name = name.removesuffix(suffix)
    words = re.split(r"[-_.]", name)
    return {split for word in (words[0], words[-1]) if (split := _split_called(word)) is not None}


def _walk(path: Path, left_out: LeftOut) -> Iterator[Path]:
    """All readable files below a folder, also behind links; a link to a folder above itself is noted and not followed."""

    def unreadable(error: OSError) -> None:
        left_out.file(Path(error.filename), UNREADABLE)

    seen: set[str] = set()
    for place, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        folder = Path(place)
        above = {os.path.realpath(each) for each in (folder, *folder.parents)}
        for name in sorted(folders):
            if name.startswith("."):
                left_out.file(folder / name, HIDDEN)
            elif os.path.realpath(folder / name) in above:
                left_out.file(folder / name, LOOP)
            else:
                continue
            folders.remove(name)
        for name in sorted(names):
            file = folder / name
            if name.startswith("."):
                left_out.file(file, HIDDEN)
            elif kind(file) is None:
                left_out.file(file, OTHER_KIND)
            elif not file.is_file() or not os.access(file, os.R_OK):
                left_out.file(file, UNREADABLE)
            elif (real := os.path.realpath(file)) in seen:
                left_out.file(file, TWICE)
            else:
                seen.add(real)
                yield file


def _named_parts(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split where names say so; none where they hold less than half of the bytes, as a lone training.md in a folder of notes does."""
    parts = files_by_split(folder, files)
    named = sum(file.stat().st_size for part in parts.values() for file in part)
    return parts if "train" in parts and 2 * named >= sum(file.stat().st_size for file in files) else {}


def _reader(paths: Sequence[Path], left_out: LeftOut) -> Documents:
    return lambda: (document for path in paths for document in read(path, left_out))


def _split_one(documents: Documents, left_out: LeftOut, places: Mapping[str, int] = PLACES) -> Mapping[str, Documents]:
    """Train, and the splits that ``places`` gives one document or block of PARTS."""
    count = sum(1 for _ in islice(documents(), PARTS))
    few = count < PARTS
    left_out.few = count if few else None

    def part(split: str) -> Documents:
        if few:
            return lambda: (text for name, text in _by_blocks(documents(), places) if name == split)
        return lambda: (text for i, text in enumerate(documents()) if _split_of(i, places) == split)

    return {split: part(split) for split in ("train", *places)}


def _split_of(number: int, places: Mapping[str, int]) -> str:
    return next((split for split, place in places.items() if number % PARTS == place), "train")


def _by_blocks(documents: Iterator[str], places: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Split and text of the parts of a few documents; neighbouring blocks of one split are one text."""
    enough = 3 * PARTS * BLOCK_CHARACTERS
    held: list[str] = []
    while sum(map(len, held)) < enough and (text := next(documents, None)) is not None:
        held.append(text)
    size = min(BLOCK_CHARACTERS, max(1, sum(map(len, held)) // (3 * PARTS)))  # of a short text less, so that each split has some
    number = count()
    for text in chain(held, documents):
        for split, run in groupby(zip(_blocks(text, size), number, strict=False), key=lambda block: _split_of(block[1], places)):
            yield split, "".join(block for block, _ in run)


def _blocks(text: str, size: int) -> Iterator[str]:
    """Pieces of whole lines of at least ``size`` characters. A line of more than twice as many is cut between words, or where it must."""
    held: list[str] = []
    count = 0
    for line in text.splitlines(keepends=True):
        for part in [line] if len(line) <= 2 * size else _cut_line(line, size):
            held.append(part)
            count += len(part)
            if count >= size:
                yield "".join(held)
                held, count = [], 0
    if held:
        yield "".join(held)


def _cut_line(line: str, size: int) -> Iterator[str]:
    for piece in cut(line, size):
        for start in range(0, len(piece), 2 * size):
            yield piece[start : start + 2 * size]
