"""Small texts by name: tiny Shakespeare, a sample of TinyStories, the passages of LAMBADA.

They are read from $GAM_DATA. Tiny Shakespeare is downloaded where it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gam_lm.data.download import check, fetch
from gam_lm.data.places import cache_root, data_root
from gam_lm.data.text_files import END_OF_TEXT
from gam_lm.errors import InputError

Documents = Callable[[], Iterator[str]]

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

FILES = {
    "tinyshakespeare": ("tinyshakespeare/input.txt",),
    "tinystories-sample": tuple(f"tinystories-sample/{split}.txt" for split in ("train", "valid", "test")),
    "lambada": ("eval/lambada_openai.jsonl",),
}
"""Corpus → its files below $GAM_DATA."""


def splits(name: str) -> Mapping[str, Documents]:
    """The splits of a corpus of FILES.

    * ``tinyshakespeare``: the first nine tenths of its characters are train, the last tenth is valid. Each is one document.
    * ``tinystories-sample``: 10,268 whole stories of TinyStories (versions 1 and 2 mixed) in a random split of train, valid (300) and test (300).
      This is a sample: about a fifth of the 50,000 stories of the paper, and not the published split.
    * ``lambada``: 5,153 passages (OpenAI's version), one a document, with their last word; test alone.

    Raises:
        InputError: where a file is missing, broken, or another edition.
    """
    paths = _paths(name)
    if name == "tinyshakespeare":
        return {"train": lambda: iter([_shakespeare(paths[0])[0]]), "valid": lambda: iter([_shakespeare(paths[0])[1]])}
    if name == "tinystories-sample":
        return {path.stem: (lambda path=path: _stories(path)) for path in paths}  # type: ignore[misc]
    return {"test": lambda: _passages(paths[0])}


def stamp(name: str) -> str:
    """Names, sizes and times of the files, or what a download must be."""
    return repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else SHAKESPEARE_SHA256 for path in _paths(name)])


def _paths(name: str) -> list[Path]:
    """The files of a corpus: in $GAM_DATA, or for tiny Shakespeare in the cache, where they may not be yet."""
    root = data_root()
    paths = [] if root is None else [root / each for each in FILES[name]]
    if paths and all(path.is_file() for path in paths):
        return paths
    if name == "tinyshakespeare":
        return [cache_root() / each for each in FILES[name]]
    missing = next((path for path in paths if not path.is_file()), Path("$GAM_DATA", FILES[name][0]))
    raise InputError(
        f"data {name!r} is not at hand: {missing} does not exist; put the file there and set GAM_DATA to the folder above {missing.parent.name}/"
    )


def _shakespeare(path: Path) -> tuple[str, str]:
    """The two parts."""
    if path.is_file():
        raw = path.read_bytes()
        check(raw, SHAKESPEARE_SHA256, "tinyshakespeare", str(path))
    else:
        raw = fetch(SHAKESPEARE, path, SHAKESPEARE_SHA256, "tinyshakespeare")
    text = raw.decode("utf-8")
    border = len(text) * 9 // 10
    return text[:border], text[border:]


def _stories(path: Path) -> Iterator[str]:
    stories = _read(path).split(END_OF_TEXT)
    return (story.strip() for story in stories if story.strip())


def _passages(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).strip().split("\n"), 1):
        try:
            row = json.loads(line)
            passage = f"{row['context']} {row['continuation'].lstrip()}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"data 'lambada': {path}, line {number} is no object with context and continuation: copy the file again") from error
        yield passage


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data {path.parent.name!r}: {path} cannot be read ({error}): copy the file again") from error
