"""Token ids, prepared once and shared by every model: a memory map per split, with a meta file that says what it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gam_lm import __version__
from gam_lm.data.corpora import SPLITS, Corpus, cache_root, load_corpus
from gam_lm.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, train_bpe, train_paper
from gam_lm.errors import InputError
from gam_lm.runtime.files import explained, replacing
from gam_lm.runtime.progress import progress

logger = logging.getLogger("gam_lm")

DOCUMENTS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 4_000_000
"""Documents are encoded in batches of at most so many characters (or one document), which bounds the memory."""


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
    splits: Mapping[str, Split]
    directory: Path
    source: Corpus
    """The text, which is read again only when it is asked for."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(self.directory / "tokenizer.json")


def prepare(
    data: str, *, tokenizer: str = "bpe", vocab_size: int = 10_000, row_limits: Mapping[str, int] | None = None, cache: Path | None = None
) -> TokenCorpus:
    """The ids of a corpus: from the cache where it was prepared before, else made now, in bounded memory.

    Args:
        data: name or path of a corpus.
        tokenizer: "bpe", "paper", or the path of a tokenizer.json.
        vocab_size: entries of a tokenizer that is trained.
        row_limits: rows that are used of a split, where not all are.
        cache: where prepared ids are kept; by default the user's cache folder.

    Raises:
        InputError: for a corpus or tokenizer that cannot be read, empty text, or a cache that cannot be written.
    """
    corpus = load_corpus(data, rows=tokenizer == "paper").limited(row_limits)
    given = None if tokenizer in ("bpe", "paper") else load_tokenizer(tokenizer)
    kind = tokenizer if given is None else f"file:{fingerprint(given)[:12]}"
    key = hashlib.sha256(repr((1, corpus.stamp, kind, vocab_size if given is None else 0)).encode()).hexdigest()[:16]
    directory = (cache or cache_root() / "tokens") / f"{corpus.name}-{kind.replace(':', '-')}-{key}"
    found = _open(directory, corpus)
    if found is not None:
        return found
    if directory.exists():
        logger.info("%s is damaged and is made anew", directory)
    with replacing(directory) as temporary:
        temporary.mkdir()
        _make(corpus, given, kind, vocab_size, temporary)
    made = _open(directory, corpus)
    assert made is not None  # it was written a moment ago
    return made


def describe(corpus: TokenCorpus) -> str:
    """A few lines on a prepared corpus."""
    lines = [f"{corpus.name}: sha256 {corpus.sha256[:16]}, tokenizer {corpus.tokenizer_name} with {corpus.vocab_size:,} entries"]
    for name, split in corpus.splits.items():
        lines.append(f"{name}: {split.tokens:,} tokens, {split.bytes:,} bytes, {split.words:,} words, {split.documents:,} documents")
    return "\n".join([*lines, f"ids: {corpus.directory}"])


def _make(corpus: Corpus, given: Tokenizer | None, kind: str, vocab_size: int, directory: Path) -> None:
    """Write tokenizer.json, the ids of each split and meta.json."""
    paper = kind == "paper"
    if given is None and "train" not in corpus.splits:
        raise InputError(f"data {corpus.name!r} is for evaluation alone: train on another corpus and use gam eval RUN --data {corpus.name}")
    for split in ("train", "valid"):
        if split in corpus.splits and next(corpus.splits[split](), None) is None:
            raise InputError(f"data {corpus.name!r} has no text in its {split} split: use a file with text in it")
    if given is not None:
        made = given
    elif paper:
        logger.info("%s: training the paper's tokenizer on all splits", corpus.name)
        made = train_paper((document for documents in corpus.splits.values() for document in documents()), vocab_size)
    else:
        logger.info("%s: training a byte-level tokenizer on the training split", corpus.name)
        made = train_bpe(corpus.splits["train"](), vocab_size)
    made.save(str(directory / "tokenizer.json"))
    size = made.get_vocab_size()
    meta: dict[str, Any] = {
        "name": corpus.name, "tokenizer_name": kind, "tokenizer_sha256": fingerprint(made), "vocab_size": size,
        "dtype": "uint16" if size <= 65_536 else "uint32", "version": __version__, "splits": {},
    }  # fmt: skip
    digest = hashlib.sha256()
    for split in SPLITS:
        if split in corpus.splits:
            digest.update(f"{split}\0".encode())
            with progress(f"{corpus.name}: {split}", None, "documents") as bar:
                counts = _encode(corpus.splits[split](), made, directory / f"{split}.bin", meta["dtype"], digest, bar.advance)
            meta["splits"][split] = counts
    (directory / "meta.json").write_text(json.dumps(meta | {"sha256": digest.hexdigest()}, indent=2), encoding="utf-8")


def _encode(documents: Iterator[str], tokenizer: Tokenizer, path: Path, dtype: str, digest: Any, advance: Any) -> dict[str, int]:
    """Append the ids of all documents to ``path``, each followed by the end of text where the tokenizer has one."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    counts = {"tokens": 0, "bytes": 0, "words": 0, "documents": 0}
    with explained(path), path.open("wb") as file:
        for batch in _batches(documents):
            for document, encoded in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
                raw = document.encode()
                digest.update(len(raw).to_bytes(8, "big"))
                digest.update(raw)
                ids = encoded.ids if end is None else [*encoded.ids, end]
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                counts["tokens"] += len(ids)
                counts["bytes"] += len(raw)
                counts["words"] += len(document.split())
                counts["documents"] += 1
            advance(len(batch))
    return counts


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of a bounded number and length together."""
    documents = iter(documents)
    held: list[str] = []
    characters = 0
    while some := list(islice(documents, 1)):
        held += some
        characters += len(some[0])
        if len(held) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _open(directory: Path, source: Corpus) -> TokenCorpus | None:
    """What :func:`prepare` left in ``directory``, or None where it is not there or not whole."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        splits = {}
        for name, counts in meta["splits"].items():
            path = directory / f"{name}.bin"
            if path.stat().st_size != counts["tokens"] * np.dtype(meta["dtype"]).itemsize or not (directory / "tokenizer.json").is_file():
                return None
            ids = np.memmap(path, dtype=meta["dtype"], mode="r") if counts["tokens"] else np.empty(0, dtype=meta["dtype"])
            splits[name] = Split(ids, counts["bytes"], counts["words"], counts["documents"])
    except (OSError, ValueError, KeyError):
        return None
    return TokenCorpus(meta["name"], meta["sha256"], meta["tokenizer_name"], meta["tokenizer_sha256"], meta["vocab_size"], splits, directory, source)
