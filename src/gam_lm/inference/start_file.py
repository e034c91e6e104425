"""The initial memory of a model as a file of its own: what `gam tune-state` learned of a text, to be loaded beside the unchanged model.

    layers.0.mixer.written.bank …          the tensors, named as in the model
    {"format", "model", "tokens", …}       the metadata, with the checksum of the model as it was trained

The values mean nothing to another model, so that loading them there is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from gam_lm.errors import InputError
from gam_lm.inference.context_file import model_checksum
from gam_lm.inference.tensor_file import read_tensors, write_tensors
from gam_lm.model import LanguageModel


class StartHeader(BaseModel):
    """The metadata of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["gam-lm initial memory 1"] = "gam-lm initial memory 1"
    model: str
    """Checksum of the model with its own initial memory."""
    data: str
    """Name of the text."""
    tokens: Annotated[int, Field(ge=0)]
    """Predicted tokens of the training."""


def initial_memory(model: LanguageModel) -> dict[str, nn.Parameter]:
    """What the memories of a model hold before the first token, by the parameters' names in the model.

    Raises InputError where there is no such memory.
    """
    found = {f"layers.{i}.mixer.{name}": each for i, layer in enumerate(model.layers) for name, each in layer.mixer.initial_memory().items()}
    if not found:
        kinds = ", ".join(sorted(set(model.config.layer_mixers)))
        raise InputError(f"mixers is {kinds}: this model has no learned initial memory, use one whose memory the text writes, as `gam train` makes by default")
    return found


def save_start(path: Path, model: LanguageModel, header: StartHeader) -> None:
    """Write the initial memory of ``model``, whole or not at all. Raises InputError where the place cannot be written."""
    write_tensors(path, initial_memory(model), header)


@torch.no_grad()
def load_start(path: Path, model: LanguageModel) -> StartHeader:
    """Put the initial memory of a file into ``model``, in place; nothing else of it changes.

    Args:
        path: as `save_start` wrote it.
        model: as it was trained, in the same dtype.

    Returns:
        What the file says of itself.

    Raises:
        InputError: where the file is missing, broken, or belongs to another model.
    """
    broken = f"start is {str(path)!r}, which is broken or no initial memory"
    again = "write it again with `gam tune-state`"
    missing = f"start is {str(path)!r}, which does not exist: write it with `gam tune-state RUN --data TEXT --out {path}`"
    header, tensors = read_tensors(path, StartHeader, missing=missing, broken=broken, again=again)
    wanted = initial_memory(model)
    if header.model != model_checksum(model):
        raise InputError(f"start is {str(path)!r}, which belongs to another model (or the same in another format): use the run that it was tuned for")
    for name, parameter in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{broken} ({name} is missing, of another size or not finite): {again}")
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])
    return header
