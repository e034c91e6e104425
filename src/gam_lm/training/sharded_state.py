"""The tensors of a sharded run on the disk, written by all processes at once while training goes on: torch.distributed.checkpoint in safetensors files.

Each process writes one file with its slices, and every file says where they lie in the whole, so that any number of processes reads what it needs. Only
tensors go there; numbers are in progress.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.runtime.files import replacing

T = TypeVar("T")

SHARDS = "shards"
"""Folder of a state that holds such files."""


def flat_state(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], average: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """All tensors of a run, each under one name; slices share their memory."""
    parts = {"model": weights, "optimizer": moments, "average": average or {}}
    return {f"{part}.{name}": tensor.detach() for part, tensors in parts.items() for name, tensor in tensors.items()}


def part_of(part: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """What `flat_state` took from one of its parts, under the names it had there."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def empty_moments(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors to read an optimiser's moments into; ``found`` are those of a state, as `stored` tells of them.

    Raises:
        IndexError: for a moment of a parameter that is not there.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = {name: each.size for name, each in found.items()}
    return {name: torch.zeros_like(parameters[int(name.partition(".")[0])]).detach() if size else torch.zeros(()) for name, size in sizes.items()}


def stored(folder: Path) -> Mapping[str, Any]:
    """Names, sizes and formats of the tensors in ``folder``, from the heads of its files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read ``tensors``, slices or whole ones, in place; on several processes all make the call.

    Raises:
        ValueError: where something is missing or has another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    alone = not (dist.is_available() and dist.is_initialized())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is, and that is what is meant
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (CheckpointException, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from error


class Writer:
    """Writes states beside the training, one at a time."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # its own: a training's collectives run at the same time
        self._writing: Future[Any] | None = None
        self._place = ExitStack()
        self._then: Callable[[], None] = lambda: None

    def save(self, path: Path, tensors: dict[str, Tensor], beside: Callable[[Path], None], then: Callable[[], None]) -> None:
        """Copy ``tensors`` and write them in the background to a state that takes the name ``path`` when it is whole. All processes make the call.

        Args:
            path: of the new state.
            tensors: of `flat_state`.
            beside: writes what else belongs to the state, on rank 0 and at once.
            then: called on rank 0 when the state has its name, by `poll` or `finish`.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        place = [""]
        if dist.get_rank() == 0:
            temporary = self._place.enter_context(replacing(path))
            (temporary / SHARDS).mkdir(parents=True)
            beside(temporary)
            place = [str(temporary / SHARDS)]
        dist.broadcast_object_list(place, src=0)
        writing: Any = async_save(tensors, storage_writer=HuggingFaceStorageWriter(place[0], save_distributed=True), process_group=self._group)
        self._writing, self._then = writing, then

    def poll(self) -> None:
        """Give what has been written its name. Raises InputError where it could not be."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and give it its name. Raises InputError where it could not be."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            with self._place:  # what is broken is removed
                writing.result()
        except InputError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"a state could not be written ({reason}): make room or choose another folder") from error
        if dist.get_rank() == 0:
            self._then()
