"""Tokenizers: byte-level BPE that loses nothing, the paper's protocol, or any tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gam_lm.errors import InputError

END_OF_TEXT = "<|endoftext|>"
"""Stands after every document of a byte-level corpus."""

PAPER_TOKENS = ("[UNK]", "[PAD]", "[SOS]", "[EOS]")

TRAINING_BYTES = 200_000_000
"""A tokenizer learns from at most this much text: merges settle long before, and the counts have to fit in memory."""


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every text comes back exactly as it was.

    Raises:
        InputError: for a vocabulary that does not hold the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least 257 entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_bounded(documents), trainer)
    return tokenizer


def train_paper(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """The published protocol: BPE over white-space separated words with [UNK] [PAD] [SOS] [EOS]. White space is lost."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(PAPER_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(_bounded(documents), trainer)
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json. Raises InputError where there is none or it is broken."""
    if not Path(path).is_file():
        raise InputError(f"tokenizer is {str(path)!r}: use bpe, paper, or the path of a tokenizer.json that exists")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise InputError(f"tokenizer {str(path)!r} cannot be read ({error}): it is no tokenizer.json") from error


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that the tokenizer does."""
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()


def _bounded(documents: Iterable[str]) -> Iterator[str]:
    left = TRAINING_BYTES
    for document in documents:
        if left <= 0:
            return
        left -= len(document.encode("utf-8", "surrogatepass"))
        yield document
