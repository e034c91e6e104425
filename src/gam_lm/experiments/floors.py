"""What takes no model: one that does not beat these has learned no context.

The counts are of the training tokens and smooth with nothing tuned on the validation split. xz has seen no training text: it compresses the validation
text alone, learning as it goes.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gam_lm.data.tokens import TokenCorpus

FLOORS = ("unigram", "bigram", "xz")
"""Names of the floors."""


Masks = tuple[np.ndarray, np.ndarray]
"""Which tokens of training and validation text count, bool; the first of each is never predicted."""


@dataclass(frozen=True, eq=False)
class Counts:
    """What a training text counts: p(x) = (count(x) + 1) / (N + V), and a bigram that is smoothed as Witten and Bell (1991) do.

    p(y | x) = (count(x, y) + t(x) p(y)) / (count(x) + t(x)), t(x) the number of different tokens seen after x. A token that ended the text, or was never seen,
    backs off wholly to p(y).
    """

    unigram_V: np.ndarray
    """p(x)."""
    pairs: np.ndarray
    """Pairs that were seen, as x V + y, in rising order."""
    pair_counts: np.ndarray
    """How often each was seen."""
    followed_V: np.ndarray
    """How often each token was followed by another."""
    kinds_V: np.ndarray
    """t(x), 1 where x was followed by none: with no counts any weight is the same."""

    @classmethod
    def of(cls, train: np.ndarray, vocab_size: int, counted: np.ndarray | None = None) -> Counts:
        """Count the ids of a text (N,), or its tokens that are ``counted``, bool (N,), and the pairs whose second token is."""
        known = _pairs(train, vocab_size)
        pairs, pair_counts = np.unique(known if counted is None else known[counted[1:]], return_counts=True)
        first = pairs // vocab_size
        followed = np.bincount(first, weights=pair_counts, minlength=vocab_size)
        kinds = np.bincount(first, minlength=vocab_size).astype(np.float64)
        return cls(_unigram(train, vocab_size, counted), pairs, pair_counts, followed, np.where(followed > 0, kinds, 1.0))

    def bigram(self, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
        """p(after | before), float64 (N,)."""
        wanted = before_N.astype(np.int64) * len(self.unigram_V) + after_N
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == wanted, self.pair_counts[place], 0)
        kinds = self.kinds_V[before_N]
        return np.asarray((seen + kinds * self.unigram_V[after_N]) / (self.followed_V[before_N] + kinds))


class Unigram:
    """The unigram of counts as what scores a text."""

    def __init__(self, counts: Counts) -> None:
        self._log_V = np.log(counts.unigram_V)
        self._likeliest = int(self._log_V.argmax())

    def log_probabilities(self, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
        """log p(after) in nats (N,)."""
        return np.asarray(self._log_V[after_N])

    def likeliest(self, before: int) -> int:
        """The most frequent token."""
        return self._likeliest


class Bigram:
    """The bigram of counts as what scores a text."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def log_probabilities(self, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
        """log p(after | before) in nats (N,)."""
        return np.asarray(np.log(self._counts.bigram(before_N, after_N)))

    def likeliest(self, before: int) -> int:
        """The token that follows ``before`` most probably, the first of equals."""
        every_V = np.arange(len(self._counts.unigram_V))
        return int(self._counts.bigram(np.full_like(every_V, before), every_V).argmax())


COUNTED = {"unigram": Unigram, "bigram": Bigram}
"""The floors that give each token a probability."""


def unigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int, counted: Masks | None = None) -> float:
    """Cross-entropy in nats per token of the unigram of `Counts`, over every validation token but the first, or those that count."""
    found = -np.log(_unigram(train, vocab_size, None if counted is None else counted[0]))[valid[1:]]
    return float(found.mean() if counted is None else found[counted[1][1:]].mean())


def bigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int, counted: Masks | None = None) -> float:
    """Cross-entropy in nats per token of the bigram of `Counts`, over every validation token but the first, or those that count."""
    found = -np.log(Counts.of(train, vocab_size, None if counted is None else counted[0]).bigram(valid[:-1], valid[1:]))
    return float(found.mean() if counted is None else found[counted[1][1:]].mean())


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


def _unigram(train: np.ndarray, vocab_size: int, counted: np.ndarray | None) -> np.ndarray:
    counts = np.bincount(train if counted is None else train[counted], minlength=vocab_size) + 1.0
    return np.asarray(counts / counts.sum())


def _pairs(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    ids = ids.astype(np.int64)
    return ids[:-1] * vocab_size + ids[1:]
