"""Ids that come one by one, as text in whole characters."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

TAIL = 8
"""Most ids of a prompt that are looked at."""


def text_after(tokenizer: Tokenizer, ids: Sequence[int]) -> DecodeStream:
    """What decodes the ids that follow ``ids`` one by one: its ``step(tokenizer, id)`` gives the text that is whole now, or None. Special tokens are no text.

    A decoder that is not byte-level drops the space before the first word of a text. The stream therefore starts behind the prompt's last ids, the fewest that
    are text. Ids that end within a character are left out: the stream would hold them back, and give them out with the first one that follows.
    """
    tails = [list(ids[-count:]) for count in range(1, min(TAIL, len(ids)) + 1)]
    texts = [tokenizer.decode(tail) for tail in tails]
    stream = DecodeStream(skip_special_tokens=True)
    for token in next((tail for tail, text in zip(tails, texts, strict=True) if text and not text.endswith("\ufffd")), []):
        stream.step(tokenizer, token)
    return stream
