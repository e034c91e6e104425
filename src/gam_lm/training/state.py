"""What a killed run goes on from: folders state/step-N of the run directory, each written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gam_lm.checkpoint import load_tensors, needed, read_json
from gam_lm.errors import InputError, checked
from gam_lm.runtime.files import replacing
from gam_lm.runtime.tensor_files import save_tensors
from gam_lm.training.sharded_state import SHARDS, empty_moments, flat_state, part_of, read_into, stored
from gam_lm.training.sharding import like, put

logger = logging.getLogger("gam_lm")

UNRECORDED = "-unrecorded"
"""Ends the name of a state whose last step is not in the metrics yet."""

DIGEST = "sha256"
"""The field of progress.json that holds the digest of the others."""

RESTART = "remove the folder state to start over, or choose a new run directory"


@checked
class Progress:
    """How far a run is: what its state holds besides tensors."""

    step: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps taken."""
    recorded: Annotated[int, Field(ge=0)] = 0
    """The step up to which metrics and validations are written; less than ``step`` where the run was stopped before or in a validation."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Predicted tokens of training."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of training."""
    curve: tuple[dict[str, int | float], ...] = ()
    """Validations so far."""
    pending: tuple[float, ...] = ()
    """Losses since the last line of metrics."""
    gradient_norm: float = 0.0
    """Of the last step."""
    stream: dict[str, Any] | None = None
    """Where a streamed data set stands, of all lanes; see gam_lm.data.stream."""


def save_state(
    directory: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
) -> None:
    """Write what the run needs to go on from ``progress`` as if it had never stopped; older states are removed afterwards.

    ``average`` holds the averaged weights by name, where the run keeps such.
    """
    path = place_of(directory, progress)
    if not path.is_dir():
        with replacing(path) as temporary:
            temporary.mkdir()
            save_tensors(temporary / "model.safetensors", own_weights(model), shown=path)
            save_tensors(temporary / "optimizer.safetensors", moments_of(optimizer), shown=path)
            if average is not None:
                save_tensors(temporary / "average.safetensors", dict(average), shown=path)
            write_numbers(temporary, progress, shown=path)
    remove_older(directory, path)


def place_of(directory: Path, progress: Progress) -> Path:
    """Where a state belongs. It is never written over: where a validation follows, the one before it has a name of its own."""
    return directory / "state" / (f"step-{progress.step:08d}" + ("" if progress.recorded == progress.step else UNRECORDED))


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, a shared one under its first name."""
    shared = _shared(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in shared}


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser, each named after its parameter's number."""
    return {f"{i}.{name}": value for i, values in optimizer.state_dict()["state"].items() for name, value in values.items()}


def write_numbers(folder: Path, progress: Progress, *, shown: Path) -> None:
    """What a state holds besides weights and moments."""
    save_tensors(folder / "generators.safetensors", generators(), shown=shown)
    values = dataclasses.asdict(progress)
    (folder / "progress.json").write_text(json.dumps(values | {DIGEST: _digest(values)}, allow_nan=False), encoding="utf-8")


def remove_older(directory: Path, path: Path) -> None:
    """Remove all states but the one at ``path``."""
    for other in (directory / "state").glob("step-*"):
        if other != path:
            shutil.rmtree(other)


def load_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
) -> Progress | None:
    """Put model, optimiser, generators and, in place, the ``average`` back to the latest state and return its progress; None where there is none.

    Raises:
        InputError: for a file that is missing, broken, or of another model.
    """
    found = list((directory / "state").glob("step-*"))
    if not found:
        return None
    path = max(found, key=lambda path: (len(path.name.removesuffix(UNRECORDED)), path.name.removesuffix(UNRECORDED), path.name[-1].isdecimal()))
    progress = _read_progress(needed(path, "progress.json"))
    states = load_tensors(needed(path, "generators.safetensors"))
    groups = optimizer.state_dict()["param_groups"]
    weights = own_weights(model)
    try:
        if (path / SHARDS).is_dir():
            moments = empty_moments(optimizer, part_of("optimizer", stored(path / SHARDS)))
            read_into(path / SHARDS, flat_state(weights, moments, average))
        else:
            put(weights, load_tensors(needed(path, "model.safetensors")))
            if average is not None:
                put(average, load_tensors(needed(path, "average.safetensors")))
            moments = load_tensors(needed(path, "optimizer.safetensors"))
        optimizer.load_state_dict({"state": _by_number(moments, optimizer), "param_groups": groups})
        set_generators(states)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path} does not fit this run ({str(error).splitlines()[-1].strip()}): {RESTART}") from error
    logger.info("resuming %s after step %d", directory, progress.step)
    return progress


def _by_number(moments: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The moments by their parameter's number, sharded as that is. Raises ValueError where the shapes differ."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError("the optimiser's moments have other shapes than the weights")
        found.setdefault(int(index), {})[name] = like(value, parameter) if value.dim() else value
    return found


def generators() -> dict[str, Tensor]:
    """The states of the random generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: Mapping[str, Tensor]) -> None:
    """The inverse of `generators`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _read_progress(path: Path) -> Progress:
    values = read_json(path)
    digest = values.pop(DIGEST, None)  # states of before 0.2 have none
    try:
        if absent := [field.name for field in dataclasses.fields(Progress) if field.name not in {*values, "stream"}]:
            raise InputError(f"{absent[0]} is missing")
        progress = Progress(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{path} is broken ({error}): {RESTART}") from error
    if progress.recorded > progress.step or (progress.recorded < progress.step and not progress.pending):
        raise InputError(f"{path} is broken (recorded is {progress.recorded} at step {progress.step}, pending is {list(progress.pending)[:3]}): {RESTART}")
    if digest is not None and digest != _digest(values):
        raise InputError(f"{path} is broken ({DIGEST} is not that of the values: they were changed): {RESTART}")
    return progress


def _digest(values: Mapping[str, object]) -> str:
    """Of progress: a number of it that was changed is as wrong as one that is missing, and looks right."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _shared(model: nn.Module) -> dict[str, str]:
    """Name → earlier name of the same parameter, as of a head that shares the embedding."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(tensor), name)) for name, tensor in model.state_dict(keep_vars=True).items()]
    return {name: earlier for name, earlier in names if name != earlier}
