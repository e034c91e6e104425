"""Tokenizers: byte-level BPE that loses nothing, the paper's protocol, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gam_lm.data.pieces import cut
from gam_lm.data.text_files import END_OF_TEXT as END_OF_TEXT
from gam_lm.errors import InputError

PAPER_TOKENS = ("[UNK]", "[PAD]", "[SOS]", "[EOS]")

MOST_ENTRIES = 2**24
"""The library that trains takes memory for all entries ahead, and aborts the process where there is none."""

WHOLE_BYTES = 60_000_000
"""A tokenizer is trained on all of a text that is no longer than this."""

SAMPLE_BYTES = 24_000_000
"""Of a longer text it is trained on a random sample of this size: its merges settle long before, and training is slow."""

SAMPLE_PIECE = 20_000
"""Characters of a piece of the sample, so that a sample of long documents holds some of each."""


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every text comes back exactly as it was.

    Raises:
        InputError: for a vocabulary that does not hold the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least 257 entries")
    _check_most(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _check_most(vocab_size: int) -> None:
    if vocab_size > MOST_ENTRIES:
        raise InputError(f"vocab_size is {vocab_size}: a tokenizer of more than {MOST_ENTRIES} entries is not trained, use fewer")


def train_paper(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """The published protocol: BPE over white-space separated words with [UNK] [PAD] [SOS] [EOS]. White space is lost."""
    if vocab_size < len(PAPER_TOKENS) + 1:
        raise InputError(f"vocab_size is {vocab_size}: the paper's tokenizer needs at least {len(PAPER_TOKENS) + 1} entries")
    _check_most(vocab_size)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(PAPER_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


class Sample(NamedTuple):
    """Text to train a tokenizer on."""

    pieces: list[str]
    """In the order of the text."""
    bytes: int
    """UTF-8 bytes of the pieces."""
    total: int
    """UTF-8 bytes of the text that they were taken from."""


def sample(documents: Iterable[str], *, whole: int = WHOLE_BYTES, size: int = SAMPLE_BYTES, seed: int = 0) -> Sample:
    """The text that a tokenizer is trained on: all of it, or a random sample of its pieces in their order.

    The text is read once, and no more of it is held than ``whole`` and one document.

    Args:
        documents: the training text.
        whole: UTF-8 bytes up to which everything is taken.
        size: UTF-8 bytes of the sample of a longer text.
        seed: of the sample, which is the same for the same text and seed.
    """
    random_number = random.Random(seed).random
    held: list[tuple[float, int, int, str]] = []  # a heap: the piece with the lowest number leaves first
    seen = kept = number = 0
    for document in documents:
        for piece in cut(document, SAMPLE_PIECE):
            length = len(piece.encode("utf-8", "surrogatepass"))
            heapq.heappush(held, (random_number(), number, length, piece))
            number += 1
            seen += length
            kept += length
            while seen > whole and kept > size:
                kept -= heapq.heappop(held)[2]
    return Sample([piece for _, _, _, piece in sorted(held, key=lambda each: each[1])], kept, seen)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json; what it does beside turning text into ids is switched off, see `plain`.

    Raises:
        InputError: where there is none or it is broken.
    """
    if not Path(path).is_file():
        raise InputError(f"tokenizer is {str(path)!r}: use bpe, paper, or the path of a tokenizer.json that exists")
    try:
        return plain(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise InputError(f"tokenizer {str(path)!r} cannot be read ({error}): it is no tokenizer.json") from error


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that turns a text into its ids and does nothing else: truncation, padding and the template of special tokens are switched off.

    Such settings are stored in many a tokenizer.json. On a corpus or a prompt they would drop text, or add tokens to it.
    """
    copy = Tokenizer.from_str(tokenizer.to_str(pretty=False))
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None  # type: ignore[assignment,unused-ignore]
    return copy


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """A plain copy for text that a stranger typed: ``<|endoftext|>`` and other special tokens in it are encoded as the characters they are."""
    copy = plain(tokenizer)
    copy.encode_special_tokens = True
    return copy


def ids_of(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """The ids of a text that a user typed. Raises InputError as `check_characters` does."""
    check_characters(text, name)
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def check_characters(text: str, name: str) -> None:
    """Raise InputError, with the ``name`` of what holds ``text``, where that holds what is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds half of a surrogate pair or a byte that is no UTF-8 at character {error.start + 1}: remove it") from error


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id and one: ids may have holes, and a model needs a row for each up to the largest."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that the tokenizer does."""
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()
