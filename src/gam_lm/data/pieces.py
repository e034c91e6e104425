"""Text in pieces that a tokenizer treats as it treats the whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

PLACE = re.compile(r"(?<=\S)[^\S\x1c-\x1f]")
"""White space after something else. The four separators of ASCII are white space for Python but not for the tokenizers."""


def cut(text: str, size: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at least ``size`` characters, the last excepted, each before white space that follows something else.

    The pieces together are the text. A text without such a place is one piece.
    """
    start = 0
    while len(text) - start > size and (place := PLACE.search(text, start + size)) is not None:
        yield text[start : place.start()]
        start = place.start()
    if start < len(text):
        yield text[start:]


def may_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of the pieces of `cut` one after the other.

    They are where every word is encoded for itself and no word holds white space after something else: with the byte-level pattern of GPT-2 and
    with splitting at white space. A normaliser, a space put before the text, or added tokens that hold or take white space rule it out.
    """
    parts: dict[str, Any] = json.loads(tokenizer.to_str(pretty=False))
    split = parts["pre_tokenizer"] or {}
    by_words = split.get("type") in ("Whitespace", "WhitespaceSplit") or (
        split.get("type") == "ByteLevel" and split["use_regex"] and not split["add_prefix_space"]
    )
    tokens_within_words = all(
        not (token["lstrip"] or token["rstrip"] or any(character.isspace() for character in token["content"])) for token in parts["added_tokens"]
    )
    return by_words and tokens_within_words and parts["normalizer"] is None and not parts["model"].get("dropout")
