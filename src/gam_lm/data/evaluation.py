"""Texts of five kinds to evaluate one model on: encyclopaedia, stories, plays, novels' passages, technical prose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from gam_lm.data.tokens import TokenCorpus, prepare
from gam_lm.errors import unknown_name

EVALUATION_TEXTS = {"wikitext-2-v1": "test", "tinystories-sample": "test", "tinyshakespeare": "valid", "lambada": "test", "stdlib": "test"}
"""Corpus → the split of it that is held out."""


def evaluation_texts(tokenizer: Path | str, names: Iterable[str] = tuple(EVALUATION_TEXTS)) -> Iterator[tuple[str, TokenCorpus]]:
    """Name and ids of each evaluation text, prepared when its turn comes; no other split than that of EVALUATION_TEXTS is encoded.

    Args:
        tokenizer: path of the model's tokenizer.json.
        names: of EVALUATION_TEXTS; by default all.

    Raises:
        InputError: for an unknown name, or a text that is not at hand.
    """
    for name in names:
        if name not in EVALUATION_TEXTS:
            raise unknown_name("evaluation text", name, EVALUATION_TEXTS)
        yield name, prepare(name, tokenizer=str(tokenizer), only=(EVALUATION_TEXTS[name],))
