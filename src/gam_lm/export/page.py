"""A page that runs a trained GAM in a browser, offline: one HTML file with the weights, the tokenizer and the code inside.

The code lies beside this file in browser/: step.js is the model, product.js its matrix product, sources.js where its reads come from,
tokenizer.js the tokenizer, page.js and memory.js what is seen.
"""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_lm.checkpoint import load_model, load_tokenizer_of
from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.errors import InputError
from gam_lm.inference.int8 import is_int8, quantize_int8
from gam_lm.mixers.gam import GAMMixer
from gam_lm.model import LanguageModel
from gam_lm.runtime.files import explained, replacing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("gam_lm")

SCRIPTS = ("product.js", "step.js", "sources.js", "tokenizer.js", "memory.js", "page.js")
MARK = '<meta name="generator" content="gam export">'
"""Stands in the head of every page; only a file with it is replaced."""
LARGE = 32 << 20
"""Bytes from which on a page takes long to open."""


def write_page(run_directory: Path, out: Path, weights: str = "int8", note: str = "") -> None:
    """Write the page of the model in ``run_directory`` to the file ``out``.

    Args:
        run_directory: of a model whose mixers are all GAM's with a bank.
        out: the HTML file.
        weights: int8, with a scale for each row of the matrices, or fp16.
        note: a sentence under the title, such as what the model was trained on.

    Raises:
        InputError: for another model or a tokenizer that is not byte-level BPE.
    """
    model = load_model(run_directory)
    _check(model)
    parts: dict[str, Any] = {"tokenizer": byte_level_bpe(load_tokenizer_of(run_directory)), "name": run_directory.resolve().name}
    if weights == "int8" and not is_int8(model):
        quantize_int8(model)
    blob, tensors = packed(model, half=weights == "fp16")
    parts |= {"config": model.config.to_dict(), "tensors": tensors, "weights": weights, "parameters": _parameters(tensors)}
    browser = files("gam_lm.export") / "browser"
    page = (browser / "page.html").read_text(encoding="utf-8")
    page = page.replace("{generator}", MARK).replace("{title}", _text(str(parts["name"]))).replace("{style}", (browser / "page.css").read_text(encoding="utf-8"))
    page = page.replace("{note}", f"<p>{_text(note)}</p>" if note else "").replace("{code}", "\n".join((browser / name).read_text(encoding="utf-8") for name in SCRIPTS))
    head, tail = page.split("{data}")
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(head)
        file.write(json.dumps(parts, separators=(",", ":")).replace("<", "\\u003c"))
        before, after = tail.split("{weights}")
        file.write(before + base64.b64encode(blob).decode("ascii") + after)
    if (size := out.stat().st_size) > LARGE:
        logger.warning("the page has %.0f MB: a phone takes long to open it", size / 2**20)


def is_page(path: Path) -> bool:
    """Whether an earlier export wrote the file. Raises InputError where it cannot be read."""
    with explained(path, "read"):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return MARK.encode() in file.read(4096)


def _text(words: str) -> str:
    """Words as HTML, in which no place of the page's template is found again."""
    return html.escape(words).replace("{", "&#123;")


def _check(model: LanguageModel) -> None:
    for layer in model.layers:
        if not isinstance(layer.mixer, GAMMixer) or layer.mixer.options.memory != "bank":
            raise InputError(f"mixers is {list(model.config.mixers)} with format 'page': the page runs gam with memory='bank' alone, use format 'onnx'")


def packed(model: LanguageModel, *, half: bool) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """All tensors one after another, and by name where each lies and how it is written: fp32, int8 with its ``scale``, and with ``half`` matrices in fp16.

    Raises:
        InputError: for a number that fp16 does not hold, or with ``half`` for a model in int8.
    """
    if half and is_int8(model):
        raise InputError("weights is 'fp16' and the run is in int8: use --weights int8, or export the run that was trained")
    blob, tensors = bytearray(), {}
    stored: Mapping[str, Tensor] = model.state_dict()
    for name, tensor in sorted(stored.items(), key=lambda each: each[1].dtype == torch.int8):  # the scales are read before what they scale
        if name.startswith("lm_head.") and model.config.tie_word_embeddings:
            continue
        entry = {"dtype": "fp32", "size": tensor.numel(), "offset": len(blob), "longest": max(tensor.shape, default=1)}
        if tensor.dtype == torch.int8:
            entry |= {"dtype": "int8", "scale": name.removesuffix("_int8") + "_scale"}
            written = tensor
        elif half and tensor.ndim > 1:
            entry["dtype"] = "fp16"
            written = tensor.half()
            if not bool(torch.isfinite(written).all()):
                raise InputError(f"weights is 'fp16', which does not hold the largest number of {name}: use int8")
        else:
            written = tensor.float()
        tensors[name.removesuffix("_int8")] = entry
        blob += written.contiguous().numpy().tobytes()
        blob += bytes(-len(blob) % 4)  # JavaScript reads numbers of 4 bytes at multiples of 4
    return bytes(blob), tensors


def _parameters(tensors: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(each["size"] for name, each in tensors.items() if not name.endswith("_scale"))


def byte_level_bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.js needs of a byte-level BPE: spellings by id, merges as pairs of ids, special tokens.

    Raises:
        InputError: for a tokenizer of another kind.
    """
    values = json.loads(tokenizer.to_str(pretty=False))
    model, before = values["model"], values["pre_tokenizer"] or {}
    unlike = [
        found
        for found, wrong in (
            (f"model {model['type']!r}", model["type"] != "BPE"),
            (f"pre_tokenizer {before.get('type')!r}", before.get("type") != "ByteLevel"),
            ("a normalizer", values["normalizer"] is not None),
            ("ignore_merges", bool(model.get("ignore_merges"))),
            ("affixes", any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"))),
        )
        if wrong
    ]
    if unlike:
        raise InputError(f"the tokenizer has {unlike[0]}: the page reads byte-level BPE alone, use format 'onnx'")
    vocabulary: dict[str, int] = model["vocab"]
    special = [[each["id"], each["content"]] for each in values["added_tokens"]]
    tokens: list[str | None] = [None] * (1 + max([*vocabulary.values(), *(number for number, _ in special)]))
    for token, number in vocabulary.items():
        tokens[number] = token
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return {
        "tokens": tokens, "merges": [vocabulary[part] for pair in pairs for part in pair], "special": special,
        "end": tokenizer.token_to_id(END_OF_TEXT), "prefix": before.get("add_prefix_space", True), "words": before.get("use_regex", True),
    }  # fmt: skip
