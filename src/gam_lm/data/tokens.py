"""Token ids, prepared once and shared by every model: a memory map per split, with a meta file that says what it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from gam_lm.data.blocks import Marks
from gam_lm.data.corpora import SPLITS, Corpus, load_corpus
from gam_lm.data.making import make
from gam_lm.data.places import cache_root
from gam_lm.data.tokenizer import fingerprint, load_tokenizer
from gam_lm.errors import InputError
from gam_lm.runtime.files import explained, replacing

logger = logging.getLogger("gam_lm")

FORMAT = 2
"""Changes when the same text and tokenizer would give other ids, or other files."""

NAME_CHARACTERS = 60
"""Of a corpus in the name of its folder: file systems end at 255 bytes."""


@dataclass(frozen=True)
class Split:
    """One split of a prepared corpus."""

    ids: np.ndarray[Any, Any]
    """Token ids (tokens,), a read-only memory map of uint16 or uint32."""
    bytes: int
    """Raw UTF-8 bytes of the documents."""
    words: int
    """White-space separated words of the documents."""
    documents: int
    """Documents."""
    marks: Marks | None = None
    """Of the ids, where not all are to be predicted."""

    @property
    def tokens(self) -> int:
        """Number of token ids, separators included."""
        return len(self.ids)


@dataclass(frozen=True)
class TokenCorpus:
    """A corpus as token ids."""

    name: str
    sha256: str
    """Of all the text, by split and document."""
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    """The largest id that the tokenizer may give, and one."""
    splits: Mapping[str, Split]
    directory: Path
    source: Corpus
    """The text, which is read again only when it is asked for."""
    left_out: tuple[str, ...] = ()
    """What was found and is not used, a line for each reason."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(self.directory / "tokenizer.json")


def prepare(
    data: str | Sequence[str],
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 10_000,
    row_limits: Mapping[str, int] | None = None,
    only: Collection[str] | None = None,
    cache: Path | None = None,
) -> TokenCorpus:
    """The ids of a corpus: from the cache where it was prepared before, else made now, in bounded memory and on all cores.

    Several processes may prepare the same corpus at once: one of them does, the others wait and use the result.

    Args:
        data: name or path of a corpus, or several paths.
        tokenizer: "bpe", "paper", or the path of a tokenizer.json, whose truncation, padding and template are ignored.
        vocab_size: entries of a tokenizer that is trained.
        row_limits: rows that are used of a split, where not all are.
        only: splits that are wanted, where not all are; a tokenizer that is trained needs train.
        cache: where prepared ids are kept; by default the user's cache folder.

    Raises:
        InputError: for a corpus or tokenizer that cannot be read, empty text, or a cache that cannot be written.
    """
    corpus = load_corpus(data, rows=tokenizer == "paper").limited(row_limits)
    return prepare_corpus(corpus, tokenizer=tokenizer, vocab_size=vocab_size, only=only, cache=cache)


def prepare_corpus(
    corpus: Corpus, *, tokenizer: str = "bpe", vocab_size: int = 10_000, only: Collection[str] | None = None, cache: Path | None = None
) -> TokenCorpus:
    """`prepare` of a corpus that is found already."""
    given = None if tokenizer in ("bpe", "paper") else load_tokenizer(tokenizer)
    kind = tokenizer if given is None else f"file:{fingerprint(given)[:12]}"
    wanted = tuple(split for split in SPLITS if split in corpus.splits and (only is None or split in only))
    key = digest_of((FORMAT, corpus.stamp, kind, vocab_size if given is None else 0, wanted))[:16]
    place = cache or cache_root() / "tokens"
    safe_name = "".join(character if character.isalnum() or character in "-_." else "_" for character in corpus.name)[:NAME_CHARACTERS]
    safe_name = safe_name.encode("ascii", "replace").decode().replace("?", "_")
    directory = place / f"{safe_name}-{kind.replace(':', '-')}-{key}"
    found = _open(directory, corpus, wanted) or _made_by_training(place, safe_name, given, corpus, wanted)
    if found is None:
        with _locked(directory):
            found = _open(directory, corpus, wanted)  # another process may have made it meanwhile
            if found is None:
                if directory.exists():
                    logger.info("%s is damaged and is made anew", directory)
                with replacing(directory) as temporary:
                    temporary.mkdir()
                    meta = make(corpus, given, kind, vocab_size, wanted, temporary)
                    (temporary / "meta.json").write_text(json.dumps(meta | {"stamp": digest_of(corpus.stamp)}, indent=2), encoding="utf-8")
                found = _open(directory, corpus, wanted)
    assert found is not None  # it was written a moment ago
    for line in found.left_out:
        logger.info("%s: left out: %s", found.name, line)
    return found


def describe(corpus: TokenCorpus) -> str:
    """A few lines on a prepared corpus."""
    lines = [f"{corpus.name}: sha256 {corpus.sha256[:16]}, tokenizer {corpus.tokenizer_name} with {corpus.vocab_size:,} entries"]
    for name, split in corpus.splits.items():
        lines.append(f"{name}: {split.tokens:,} tokens, {split.bytes:,} bytes, {split.words:,} words, {split.documents:,} documents")
    lines += [f"left out: {line}" for line in corpus.left_out]
    return "\n".join([*lines, f"ids: {corpus.directory}"]).encode("utf-8", "backslashreplace").decode()


def digest_of(value: object) -> str:
    """SHA-256 of what ``repr`` says of a value; file names in it may be no UTF-8."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


class _locked:
    """Holds a corpus while it is prepared, and removes what a killed process left half made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory.parent / ".locks" / f"{directory.name}.lock")

    def __enter__(self) -> None:
        with explained(self._directory):
            (self._directory.parent / ".locks").mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                logger.info("another process prepares %s: waiting for it", self._directory.name)
                self._lock.acquire()
            except NotImplementedError as error:
                raise InputError(f"{self._directory.parent} is on a file system without locks: set XDG_CACHE_HOME to a folder on another") from error
        for left in self._directory.parent.glob(f".{self._directory.name}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _made_by_training(place: Path, name: str, given: Tokenizer | None, corpus: Corpus, wanted: tuple[str, ...]) -> TokenCorpus | None:
    """The same text with the same tokenizer, found where the tokenizer was trained: what `gam eval` asks for after `gam train`."""
    if given is None:
        return None
    for directory in sorted(place.glob(f"{name}-*")):
        found = _open(directory, corpus, wanted)
        if found is not None and found.tokenizer_sha256 == fingerprint(given):
            return found
    return None


def _open(directory: Path, source: Corpus, wanted: tuple[str, ...]) -> TokenCorpus | None:
    """What `prepare` left in ``directory``, or None where it is not there, not whole, of another text, or lacks a split that is wanted."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["stamp"] != digest_of(source.stamp) or not set(wanted) <= set(meta["splits"]) or not (directory / "tokenizer.json").is_file():
            return None
        splits = {}
        for name, counts in meta["splits"].items():
            path = directory / f"{name}.bin"
            if path.stat().st_size != counts["tokens"] * np.dtype(meta["dtype"]).itemsize:
                return None
            ids = np.memmap(path, dtype=meta["dtype"], mode="r") if counts["tokens"] else np.empty(0, dtype=meta["dtype"])
            splits[name] = Split(ids, counts["bytes"], counts["words"], counts["documents"])
        left_out = (*source.left_out.in_files(), *meta["left_out"])
        return TokenCorpus(
            source.name, meta["sha256"], meta["tokenizer_name"], meta["tokenizer_sha256"], meta["vocab_size"], splits, directory, source, left_out
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
