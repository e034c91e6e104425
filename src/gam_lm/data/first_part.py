"""The first part of a long validation split, with the bytes and words of exactly that part."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from gam_lm.data.tokenizer import vocabulary_size
from gam_lm.data.tokens import TokenCorpus


def with_first_tokens(corpus: TokenCorpus, split: str, tokens: int) -> TokenCorpus:
    """The same corpus with the first ``tokens`` ids of a split alone.

    Bytes are counted from the ids, which a byte-level tokenizer allows to the byte; with another tokenizer the split stays whole.
    """
    whole = corpus.splits[split]
    lengths = bytes_of_tokens(corpus.tokenizer)
    if tokens >= whole.tokens or lengths is None or whole.marks is not None:
        return corpus
    ids = whole.ids[:tokens]
    ends = int((lengths[ids] == 0).sum())
    part = replace(whole, ids=ids, bytes=int(lengths[ids].sum()), words=len(text_of(corpus.tokenizer, ids).split()), documents=ends + 1)
    return replace(corpus, splits={**corpus.splits, split: part})


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes of the text of each id, int64 (V,), 0 for special tokens; None where the tokenizer is not byte-level."""
    described = json.loads(tokenizer.to_str(pretty=False))
    if (described.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    lengths = np.zeros(vocabulary_size(tokenizer), np.int64)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        lengths[number] = len(token)  # the alphabet has one character for each byte
    for number, added in tokenizer.get_added_tokens_decoder().items():  # these are spelt as in the text
        lengths[number] = 0 if added.special else len(added.content.encode())
    return lengths


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of ids, special tokens left out."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)
