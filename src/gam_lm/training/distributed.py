"""Data parallelism: the processes that a launcher started train one model, each on its rows of every batch. Applied from outside the model.

`torchrun --nproc-per-node 8 -m gam_lm train …` is the command of one process with the same result. Rank 0 owns the run directory; the others only read it,
so that it must lie where all see it. A batch is a function of its step whatever the number of processes, and so a run goes on with any number of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from gam_lm.errors import InputError
from gam_lm.runtime import processes
from gam_lm.training.sharding import is_sharded

logger = logging.getLogger("gam_lm")

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of a run, and which one this is."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, compare=False, repr=False)
    """Through which the launcher joined them, where `joined` did."""

    @classmethod
    def current(cls) -> World:
        """The default process group of torch.distributed; one process where there is none."""
        joined = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if joined else cls()

    def first(self, work: Callable[[], T], then: Callable[[], T] | None = None) -> T | None:
        """Let rank 0 do ``work`` while the others wait, and then do ``then``, if given. What is wrong with the input is wrong for all.

        Returns:
            What ``work`` or ``then`` returned; None for ranks that did nothing.

        Raises:
            InputError: on every rank, where ``work`` raised it.
        """
        if self.size == 1:
            return work()
        found, outcome = None, [""]
        if self.rank == 0:
            try:
                found = work()
            except InputError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            raise InputError(outcome[0])
        return found if self.rank == 0 or then is None else then()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return here
        found = torch.tensor(int(here))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def each(self, *here: bool) -> tuple[bool, ...]:
        """Which of these are so on any rank."""
        if self.size == 1:
            return here
        found = torch.tensor(here).int()
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(map(bool, found.tolist()))

    def gather(self, own: T) -> list[T]:
        """What every rank gives, in the order of the ranks."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(own)
        return own


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """Join the processes that a launcher started, until the block ends; without a launcher there is one.

    Args:
        device: as `gam_lm.training.precision.choose_device` takes it.

    Yields:
        The processes, and the device of this one: of several GPUs on a machine each process has its own.
    """
    if processes.world_size() == 1:
        yield World(), device
        return
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]:
        raise InputError(f"the environment variable WORLD_SIZE is {processes.world_size()} and {absent[0]} is not set: start with torchrun, or unset WORLD_SIZE")
    has_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if has_gpu:
        device = f"cuda:{processes.local_rank()}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store over restarts, and with it the addresses of the dead. Launchers of several machines may count differently.
    if processes.local_world_size() == size:
        store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield replace(World.current(), store=store), device
    finally:
        dist.destroy_process_group()


class DataParallel:
    """One model on all processes, whose gradients are summed in the backward pass of a batch's last part.

    Args:
        model: the same on every process, whose rank 0's weights are taken, or spread over them (see gam_lm.training.sharding).
        world: the processes.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.module: nn.Module = model
        self._sharded = is_sharded(model)
        self._several: DistributedDataParallel | None = None
        if world.size > 1 and not self._sharded:
            self.module = self._several = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def parts(self, rows: Tensor, accumulate: int) -> Sequence[Tensor]:
        """This process's rows of a batch, in parts of no more rows than ``accumulate`` parts of the whole batch have."""
        own = rows.tensor_split(self.world.size)[self.world.rank]
        return own.tensor_split(min(len(own), -(-accumulate // self.world.size)))

    def summed(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a part: only the last one of a batch sums the gradients over the processes."""
        if self._sharded:
            sharded: Any = self.module
            sharded.set_requires_gradient_sync(last)
        return nullcontext() if last or self._several is None else self._several.no_sync()

    @property
    def scale(self) -> int:
        """What a loss is multiplied by: DistributedDataParallel takes the mean over the processes, and shares of a batch add up."""
        return self.world.size if self._several is not None else 1


def check_batch(batch_size: int, world: World, *, shard: bool = False) -> None:
    """Raise InputError where a process would have no row of a batch, or with ``shard`` another number of parts than the others."""
    if batch_size < world.size:
        raise InputError(f"batch_size is {batch_size} for {world.size} processes: use a batch of at least as many sequences")
    if shard and world.size == 1:
        raise InputError("shard is True for one process: start several with torchrun, or leave it out")
    if shard and batch_size % world.size:
        raise InputError(f"batch_size is {batch_size} for {world.size} processes with shard: use a multiple of {world.size}")


def own_randomness(seed: int, step: int, world: World) -> None:
    """Give dropout on the ranks above 0 numbers of its own in each step, a function of the step; rank 0 draws what one process draws."""
    if world.rank:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, world.rank)).generate_state(1, np.uint64)[0] >> 1))
