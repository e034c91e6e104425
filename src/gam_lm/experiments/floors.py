"""What takes no model: one that does not beat these has learned no context.

The counts are of the training tokens and smooth with nothing tuned on the validation split. xz has seen no training text: it compresses the validation
text alone, learning as it goes.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable

import numpy as np

from gam_lm.data.tokens import TokenCorpus

FLOORS = ("unigram", "bigram", "xz")
"""Names of the floors."""


Masks = tuple[np.ndarray, np.ndarray]
"""Which tokens of training and validation text count, bool; the first of each is never predicted."""


def unigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int, counted: Masks | None = None) -> float:
    """Cross-entropy in nats per token of p(x) = (count(x) + 1) / (N + V), over every validation token but the first, or those that count."""
    found = -np.log(_unigram(train, vocab_size, counted))[valid[1:]]
    return float(found.mean() if counted is None else found[counted[1][1:]].mean())


def bigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int, counted: Masks | None = None) -> float:
    """Cross-entropy in nats per token of a Witten–Bell smoothed bigram (Witten & Bell 1991), over every validation token but the first.

    p(y | x) = (count(x, y) + t(x) p(y)) / (count(x) + t(x)), t(x) the number of different tokens seen after x, p(y) the unigram above.
    With ``counted`` both texts have the pairs alone whose second token counts.
    """
    unigram = _unigram(train, vocab_size, counted)
    known, wanted = _pairs(train, vocab_size), _pairs(valid, vocab_size)
    if counted is not None:
        known, wanted = known[counted[0][1:]], wanted[counted[1][1:]]
    pairs, pair_counts = np.unique(known, return_counts=True)
    first = pairs // vocab_size
    followed = np.bincount(first, weights=pair_counts, minlength=vocab_size)
    kinds = np.bincount(first, minlength=vocab_size).astype(np.float64)
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    before, after = wanted // vocab_size, wanted % vocab_size
    kinds_before = np.where(followed[before] > 0, kinds[before], 1.0)  # a token that ended the text, or was never seen, backs off wholly
    return float(-np.log((seen + kinds_before * unigram[after]) / (followed[before] + kinds_before)).mean())


def xz_bytes(documents: Iterable[str]) -> int:
    """Size of a text, its documents end to end in UTF-8, after `xz -9e`. (The window is as long as the text where that is shorter, which saves memory alone.)"""
    raw = [document.encode() for document in documents]
    window = min(64 * 2**20, max(4096, sum(map(len, raw))))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    return sum(len(compressor.compress(each)) for each in raw) + len(compressor.flush())


def floors(corpus: TokenCorpus) -> dict[str, float]:
    """The floors of a corpus in nats per validation token, by name; those of xz are its bits, spread over the same tokens."""
    train, valid = (np.asarray(corpus.splits[split].ids) for split in ("train", "valid"))
    return {
        "unigram": unigram_nats(train, valid, corpus.vocab_size),
        "bigram": bigram_nats(train, valid, corpus.vocab_size),
        "xz": 8 * math.log(2) * xz_bytes(corpus.source.splits["valid"]()) / (len(valid) - 1),
    }


def _unigram(train: np.ndarray, vocab_size: int, counted: Masks | None) -> np.ndarray:
    counts = np.bincount(train if counted is None else train[counted[0]], minlength=vocab_size) + 1.0
    return np.asarray(counts / counts.sum())


def _pairs(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    ids = ids.astype(np.int64)
    return ids[:-1] * vocab_size + ids[1:]
