"""A cache of ``generate()`` on the disk: one safetensors file whose metadata is JSON.

    state.position  state.0.0 …         the tensors, as in a saved context (see gam_lm.inference.context_file)
    {"format", "model", "length"}       the metadata, with the checksum of the model
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gam_lm.errors import InputError
from gam_lm.inference.context_file import model_checksum, named_tensors, state_of_tensors
from gam_lm.inference.tensor_file import read_tensors, write_tensors
from gam_lm.model import State

if TYPE_CHECKING:
    from gam_lm.hf.modeling_gam import GAMForCausalLM


class CacheHeader(BaseModel):
    """The metadata of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["gam-lm cache 1"] = "gam-lm cache 1"
    model: str
    """Checksum."""
    length: Annotated[int, Field(ge=1, lt=2**62)]
    """Tokens seen, padding included."""


def save_cache(state: State | None, length: int, path: Path, model: GAMForCausalLM) -> None:
    """Write the state of ``model`` after ``length`` tokens. Raises InputError where nothing was read, or the place cannot be written."""
    if state is None:
        raise InputError("the cache has read nothing: call the model with it before you save it")
    header = CacheHeader(model=model_checksum(model.to_language_model()), length=length)
    write_tensors(path, named_tensors("state", state), header)


def load_cache(path: Path, model: GAMForCausalLM) -> tuple[State, int]:
    """The state and the number of tokens seen, on the device of ``model``.

    Raises:
        InputError: where the file is missing, broken, or belongs to another model.
    """
    broken, again = f"{path} is broken or no saved cache", "save it again"
    missing = f"{path} does not exist: write it with cache.save(path, model)"
    header, tensors = read_tensors(path, CacheHeader, missing=missing, broken=broken, again=again)
    plain = model.to_language_model()
    if header.model != model_checksum(plain):
        raise InputError(f"{path} was read by another model (or the same in another dtype): load the model it was saved with, or read the text again")
    try:
        return state_of_tensors(tensors, "state", plain.initial_state(len(tensors["state.position"]))), header.length
    except (KeyError, ValueError) as error:
        raise InputError(f"{broken} ({error}): {again}") from error
