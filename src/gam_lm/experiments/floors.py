"""What counting gets: a model that does not beat these has learned no context.

Both count the training tokens and smooth with nothing tuned on the validation split.
"""

from __future__ import annotations

import numpy as np

from gam_lm.data.tokens import TokenCorpus


def unigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy in nats per token of p(x) = (count(x) + 1) / (N + V), over every validation token but the first."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[valid[1:]].mean())


def bigram_nats(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy in nats per token of a Witten–Bell smoothed bigram (Witten & Bell 1991), over every validation token but the first.

    p(y | x) = (count(x, y) + t(x) p(y)) / (count(x) + t(x)), t(x) the number of different tokens seen after x, p(y) the unigram above.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    first = pairs // vocab_size
    followed = np.bincount(first, weights=pair_counts, minlength=vocab_size)
    kinds = np.bincount(first, minlength=vocab_size).astype(np.float64)
    wanted = _pairs(valid, vocab_size)
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    before, after = wanted // vocab_size, wanted % vocab_size
    kinds_before = np.where(followed[before] > 0, kinds[before], 1.0)  # a token that ended the text, or was never seen, backs off wholly
    return float(-np.log((seen + kinds_before * unigram[after]) / (followed[before] + kinds_before)).mean())


def floors(corpus: TokenCorpus) -> dict[str, float]:
    """Both floors of a corpus in nats per validation token, by name."""
    train, valid = (np.asarray(corpus.splits[split].ids) for split in ("train", "valid"))
    return {"unigram": unigram_nats(train, valid, corpus.vocab_size), "bigram": bigram_nats(train, valid, corpus.vocab_size)}


def _pairs(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    ids = ids.astype(np.int64)
    return ids[:-1] * vocab_size + ids[1:]
