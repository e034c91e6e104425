"""From a corpus to its tokenizer and ids, in bounded memory, with a progress bar at every stage."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from gam_lm import __version__
from gam_lm.data.corpora import Corpus
from gam_lm.data.encoding import Encoder, encode_all
from gam_lm.data.pieces import cut
from gam_lm.data.tokenizer import END_OF_TEXT, fingerprint, sample, train_bpe, train_paper, vocabulary_size
from gam_lm.errors import InputError
from gam_lm.runtime.files import explained
from gam_lm.runtime.progress import progress

logger = logging.getLogger("gam_lm")

PIECE_CHARACTERS = 500_000
"""Of a piece of a document that is encoded at once, where its tokenizer allows cutting: bounds the memory and keeps all cores at work."""

MEGABYTE = 1_000_000


def make(corpus: Corpus, given: Tokenizer | None, kind: str, vocab_size: int, wanted: tuple[str, ...], directory: Path) -> dict[str, Any]:
    """Write tokenizer.json and the ids of each split that is wanted into ``directory``, and return what is known of them.

    Raises:
        InputError: where the train or validation split has no text, or a tokenizer has to be trained without text to train on.
    """
    if given is None and "train" not in corpus.splits:
        raise InputError(f"data {corpus.name!r} is for evaluation alone: train on another corpus and use gam eval RUN --data {corpus.name}")
    for split in ("train", "valid"):
        if split in corpus.splits and next(corpus.splits[split](), None) is None:
            raise InputError(f"data {corpus.name!r} has no text in its {split} split: use a file with more text in it")
    made = given or _trained(corpus, kind, vocab_size)
    made.save(str(directory / "tokenizer.json"))
    size = vocabulary_size(made)
    dtype = "uint16" if size <= 65_536 else "uint32"
    encoder = Encoder(made, dtype)
    if made.token_to_id(END_OF_TEXT) is None and kind != "paper":
        logger.info("the tokenizer has no %s: documents follow each other without a separator", END_OF_TEXT)
    digest = hashlib.sha256()
    splits = {}
    for split in wanted:
        digest.update(f"{split}\0".encode())
        with _megabytes(f"{corpus.name}: encoding {split}", corpus.sizes.get(split)) as advance:
            splits[split] = _Writer(made, encoder, directory, split, digest, advance).write(corpus.splits[split]())
    return {
        "name": corpus.name, "tokenizer_name": kind, "tokenizer_sha256": fingerprint(made), "vocab_size": size, "dtype": dtype, "version": __version__,
        "sha256": digest.hexdigest(), "splits": splits, "left_out": corpus.left_out.in_documents(),
    }  # fmt: skip


def _trained(corpus: Corpus, kind: str, vocab_size: int) -> Tokenizer:
    """A tokenizer of the training split, or as the paper has it of all splits: of all their text, or of a sample of it."""
    names = tuple(corpus.splits) if kind == "paper" else ("train",)
    total = sum(corpus.sizes.get(name, 0) for name in names) or None
    with _megabytes(f"{corpus.name}: reading", total) as advance:
        taken = sample(_counted(chain.from_iterable(corpus.splits[name]() for name in names), advance))
    of = (
        f"a sample of {taken.bytes / MEGABYTE:.0f} of {taken.total / MEGABYTE:.0f} MB"
        if taken.bytes < taken.total
        else f"{taken.bytes / MEGABYTE:.1f} MB"
    )
    logger.info("%s: training %s tokenizer on %s", corpus.name, "the paper's" if kind == "paper" else "a byte-level", of)
    train = train_paper if kind == "paper" else train_bpe
    with _megabytes(f"{corpus.name}: training the tokenizer", taken.bytes) as advance:
        return train(_counted(taken.pieces, advance), vocab_size)


class _Writer:
    """Writes the ids of one split, each document followed by the end of text where the tokenizer has one."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, directory: Path, split: str, digest: Any, advance: Callable[[int], None]) -> None:
        end = tokenizer.token_to_id(END_OF_TEXT)
        self._end = b"" if end is None else np.asarray([end], dtype=encoder.dtype).tobytes()
        self._encoder, self._directory, self._split = encoder, directory, split
        self._digest, self._advance = digest, advance
        self._ends: deque[tuple[bool, int]] = deque()  # of each piece on its way: whether it ends its document, and its bytes
        self.counts = {"tokens": 0, "bytes": 0, "words": 0, "documents": 0}

    def write(self, documents: Iterator[str]) -> dict[str, int]:
        """Write all documents and return tokens, bytes, words and documents."""
        path = self._directory / f"{self._split}.bin"
        with explained(path), path.open("wb") as file:
            for encoded in encode_all(self._pieces(documents), self._encoder, self._directory / "tokenizer.json"):
                self._put(file, encoded.ids, encoded.words)
            self.counts["tokens"] = file.tell() // np.dtype(self._encoder.dtype).itemsize
        return self.counts

    def _pieces(self, documents: Iterator[str]) -> Iterator[str]:
        for document in documents:
            raw = document.encode()
            self._digest.update(len(raw).to_bytes(8, "big"))
            self._digest.update(raw)
            self.counts["bytes"] += len(raw)
            self.counts["documents"] += 1
            pieces = list(cut(document, PIECE_CHARACTERS)) if self._encoder.cuts and len(document) > PIECE_CHARACTERS else [document]
            for i, piece in enumerate(pieces):
                last = i == len(pieces) - 1
                self._ends.append((last, len(raw) if last else 0))
                yield piece

    def _put(self, file: BinaryIO, ids: bytes, words: int) -> None:
        last, length = self._ends.popleft()
        file.write(ids)
        if last:
            file.write(self._end)
            self._advance(length)
        self.counts["words"] += words


def _counted(documents: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    for document in documents:
        advance(len(document.encode()))
        yield document


@contextmanager
def _megabytes(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar in megabytes that is advanced by bytes."""
    with progress(description, total and -(-total // MEGABYTE), "MB") as bar:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if whole := done // MEGABYTE - bar.done:
                bar.advance(whole)

        yield advance
