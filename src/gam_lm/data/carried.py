"""Token ids in a folder of their own, for a machine that has neither the text nor a network: ids, tokenizer and what they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gam_lm.data.corpora import Corpus, Documents
from gam_lm.data.first_part import text_of, with_first_tokens
from gam_lm.data.tokenizer import load_tokenizer
from gam_lm.data.tokens import Split, TokenCorpus, digest_of
from gam_lm.errors import InputError
from gam_lm.runtime.files import explained, replacing, write_text

MARK = "carried.json"
"""What tells such a folder from a folder of texts."""


def carry(corpus: TokenCorpus, folder: Path, tokens: Mapping[str, int]) -> None:
    """Write the first ``tokens`` of each split to ``folder``, two bytes each where the vocabulary has at most 65,536 entries.

    Raises:
        InputError: for a folder that is something else, or a tokenizer whose ids do not tell their bytes.
    """
    if folder.exists() and not (folder / MARK).is_file():
        raise InputError(f"carry is {str(folder)!r}, which is there and holds no carried ids: name a folder that is not there")
    part = corpus
    for split, count in tokens.items():
        part = with_first_tokens(part, split, count)
        if part.splits[split].tokens > count:
            raise InputError(f"carry wants {count:,} tokens of {split}, and this tokenizer's ids do not tell their bytes: use the byte-level one (tokenizer 'bpe')")
    kind = np.uint16 if part.vocab_size <= 1 << 16 else np.uint32
    meta = {
        "name": part.name, "sha256": digest_of((corpus.sha256, sorted(tokens.items()))), "tokenizer_name": part.tokenizer_name, "tokenizer_sha256": part.tokenizer_sha256,
        "vocab_size": part.vocab_size, "dtype": np.dtype(kind).name,
        "splits": {name: {"tokens": each.tokens, "bytes": each.bytes, "words": each.words, "documents": each.documents} for name in tokens for each in [part.splits[name]]},
    }  # fmt: skip
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name in tokens:
            np.asarray(part.splits[name].ids).astype(kind).tofile(temporary / f"{name}.bin")
        shutil.copyfile(part.directory / "tokenizer.json", temporary / "tokenizer.json")
        write_text(temporary / MARK, json.dumps(meta, indent=2) + "\n")


def carried(folder: Path) -> TokenCorpus | None:
    """The corpus of a folder that `carry` wrote; None for anything else. Raises InputError where it is not whole."""
    if not (folder / MARK).is_file():
        return None
    with explained(folder / MARK, "read"):
        text = (folder / MARK).read_text(encoding="utf-8")
    try:
        meta = json.loads(text)
        load_tokenizer(str(folder / "tokenizer.json"))
        splits, texts = {}, {}
        for name, counts in meta["splits"].items():
            path = folder / f"{name}.bin"
            if path.stat().st_size != counts["tokens"] * np.dtype(meta["dtype"]).itemsize:
                raise ValueError(f"{path.name} has not the length that {MARK} says")
            ids = np.memmap(path, dtype=meta["dtype"], mode="r")
            splits[name] = Split(ids, counts["bytes"], counts["words"], counts["documents"])
            texts[name] = _text(folder, ids)
        source = Corpus(meta["name"], texts, meta["sha256"])
        return TokenCorpus(meta["name"], meta["sha256"], meta["tokenizer_name"], meta["tokenizer_sha256"], meta["vocab_size"], splits, folder, source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data {str(folder)!r} is not whole ({error}): copy it again") from error


def _text(folder: Path, ids: np.ndarray) -> Documents:
    """What ids say, as one document."""

    def documents() -> Iterator[str]:
        yield text_of(load_tokenizer(str(folder / "tokenizer.json")), ids)

    return documents
