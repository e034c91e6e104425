"""A context on the disk: one safetensors file whose metadata is JSON.

    state.position  state.0.0 …  ring.0.position  ring.0.0.0 …  tail  logits      the tensors
    {"format", "model", "tokenizer", "every", "keep", "count", "ring", …}         the metadata, with the checksums of model and tokenizer

A state means nothing to another model, so that loading it there is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.inference.context import Context, Earlier, state_tensors
from gam_lm.inference.tensor_file import read_tensors, write_tensors
from gam_lm.model import LanguageModel, State

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Whole = Annotated[int, Field(ge=0, lt=2**62)]


class Header(BaseModel):
    """The metadata of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["gam-lm context 1"]
    model: str
    """Checksum."""
    tokenizer: str | None
    """Checksum; None where the context was saved without."""
    every: Annotated[int, Field(ge=1, lt=2**31)]
    keep: Annotated[int, Field(ge=1, le=4096)]
    count: Whole
    ring: Annotated[list[Whole], Field(max_length=4096)]
    """Tokens read before each state of the ring."""


def save_context(context: Context, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the context to ``path``, whole or not at all, with the checksums of its model and, when given, its tokenizer.

    Raises InputError where the place cannot be written.
    """
    header = Header(
        format="gam-lm context 1", model=model_checksum(context.model), tokenizer=None if tokenizer is None else tokenizer_checksum(tokenizer),
        every=context.every, keep=context.keep, count=context.count, ring=[earlier.tokens for earlier in context.ring],
    )  # fmt: skip
    tensors = named_tensors("state", context.state) | {"tail": context.tail}
    if context.logits is not None:
        tensors["logits"] = context.logits
    for i, earlier in enumerate(context.ring):
        tensors |= named_tensors(f"ring.{i}", earlier.state)
    write_tensors(path, tensors, header)


def load_context(path: Path, model: LanguageModel, tokenizer: Tokenizer | None = None) -> Context:
    """Read a context, onto the device of ``model``.

    Args:
        path: as `save_context` wrote it.
        model: the one that read the text: same configuration, weights and dtype.
        tokenizer: the one whose ids were read; None leaves it unchecked.

    Raises:
        InputError: where the file is missing, broken, or belongs to another model or tokenizer.
    """
    broken, again = f"{path} is broken or no saved context", "write it again with `gam read`"
    missing = f"{path} does not exist: write it with `gam read RUN TEXT --out {path}`"
    header, tensors = read_tensors(path, Header, missing=missing, broken=broken, again=again)
    if header.model != model_checksum(model):
        raise InputError(f"{path} was read by another model (or the same in another dtype): load the model it was saved with, or read the text again")
    if tokenizer is not None and header.tokenizer is not None and header.tokenizer != tokenizer_checksum(tokenizer):
        raise InputError(f"{path} was read with another tokenizer: use the one it was saved with, or read the text again")
    try:
        return _restored(header, tensors, model)
    except (KeyError, ValueError) as error:
        raise InputError(f"{broken} ({error}): {again}") from error


def _restored(header: Header, tensors: dict[str, Tensor], model: LanguageModel) -> Context:
    """The context; KeyError and ValueError where the tensors are not those of a state of ``model``."""
    rows = len(tensors["state.position"])
    context = Context(model, batch_size=rows, every=header.every, keep=header.keep)
    device = context.tail.device
    pattern = context.state
    state = state_of_tensors(tensors, "state", pattern)
    tail = tensors["tail"]
    if tail.dtype != torch.long or tail.ndim != 2 or len(tail) != rows or (tail.numel() and not 0 <= int(tail.min()) <= int(tail.max()) < model.config.vocab_size):
        raise ValueError("tail does not hold the ids of each row")
    if (logits := tensors.get("logits")) is not None:
        if logits.shape != (rows, model.config.vocab_size):
            raise ValueError(f"logits have the shape {tuple(logits.shape)}")
        context.logits = logits.to(device)
    if header.count and logits is None:
        raise ValueError("logits are missing")
    if sorted(set(header.ring)) != header.ring or any(count > header.count for count in header.ring) or len(header.ring) > header.keep:
        raise ValueError("the ring is out of order")
    ring = [Earlier(count, state_of_tensors(tensors, f"ring.{i}", pattern)) for i, count in enumerate(header.ring)]
    context.state, context.tail, context.count, context.ring = state, tail.to(device), header.count, deque(ring, maxlen=header.keep)
    return context


def named_tensors(prefix: str, state: State) -> dict[str, Tensor]:
    """The tensors of a state by the names that they have in a file."""
    layers = {f"{prefix}.{i}.{j}": tensor for i, layer in enumerate(state.layers) for j, tensor in enumerate(layer)}
    return {f"{prefix}.position": state.position_B} | layers


def state_of_tensors(tensors: dict[str, Tensor], prefix: str, pattern: State) -> State:
    """A state of the same parts as ``pattern``: sizes equal, but those that a start has as 0 and that grow.

    Raises KeyError for a missing tensor, ValueError for one of another size or dtype.
    """
    names = list(named_tensors(prefix, pattern))
    found = []
    for name, like in zip(names, state_tensors(pattern), strict=True):
        tensor = tensors[name]
        fits = tensor.ndim == like.ndim and all(size == wanted or (not wanted and i) for i, (size, wanted) in enumerate(zip(tensor.shape, like.shape, strict=True)))
        if not fits or tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the model's is {like.dtype} {tuple(like.shape)}")
        found.append(tensor.to(like.device))
    position_B, rest = found[0], iter(found[1:])
    return State(position_B, tuple(tuple(next(rest) for _ in layer) for layer in pattern.layers))


def model_checksum(model: LanguageModel) -> str:
    """SHA-256 of the configuration and of all weights as they are, in hexadecimal."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_checksum(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON, in hexadecimal."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
