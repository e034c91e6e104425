"""Memory of each process of a run on gloo: of a long sequence in pieces, and of training steps beside what the cost model says."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import model_cost
from gam_lm.diagnostics.plan import held_bytes
from gam_lm.runtime.allocator import give_back
from gam_lm.runtime.isolation import high_water, reset_high_water, resident_bytes
from gam_lm.runtime.measure import BYTES_PER_MB
from gam_lm.training.context_parallel import context_parallel, piece_of
from gam_lm.training.distributed import DataParallel, World
from gam_lm.training.loop import new_model
from gam_lm.training.optimizers import make_optimizer
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.sharding import shard as shard_model
from gam_lm.training.step import train_step

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
"""Environment of a process whose tensors come from the system one by one and go back to it; the second for PyTorch, against large pages."""


def long_sequence(config: ModelConfig, tokens: int, count: int) -> dict[str, Any]:
    """Forward and backward pass over one sequence in ``count`` pieces, and over a sequence of a piece's length on one process.

    Returns:
        Tokens, processes, and in MB what the largest process and the one process took beyond the model, with their ratio.
    """
    several = max(_on_processes(count, _piece, config.to_dict(), tokens))
    one = max(_on_processes(1, _piece, config.to_dict(), tokens // count))
    return {"sequence_length": tokens, "processes": count, "peak_memory_mb": several, "piece_alone_mb": one, "memory_ratio": several / one}


def training_memory(config: ModelConfig, recipe: TrainConfig, count: int, *, shard: bool) -> dict[str, Any]:
    """Three training steps in fp32 on ``count`` processes, whose rows are one part each.

    Returns:
        In MB, what the largest process took, and what the plan of `gam inspect cost --plan` expects of such a step.
    """
    found = max(_on_processes(count, _steps, config.to_dict(), recipe.to_dict(), shard))
    expected = held_bytes(config, recipe.context, count, copies=0)[int(shard)] + model_cost(config, recipe.context).activation_bytes * recipe.context * (
        recipe.batch_size // count
    )
    return {
        "processes": count, "sharded": shard, "peak_memory_mb": found, "expected_memory_mb": expected / BYTES_PER_MB,
        "memory_ratio": found * BYTES_PER_MB / expected,
    }  # fmt: skip


def _on_processes(count: int, work: Callable[..., float], *arguments: Any) -> list[float]:
    """What ``work`` returns on each of ``count`` new processes."""
    with tempfile.TemporaryDirectory() as folder, _giving_back():
        spawn(_process, args=(count, folder, work, arguments), nprocs=count)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
    """New processes return every tensor that they free to the system, so that what they hold is what they need at a time."""
    before = {name: os.environ.get(name) for name in GIVING_BACK}
    os.environ.update(GIVING_BACK)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _process(rank: int, count: int, folder: str, work: Callable[..., float], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    try:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(work(*arguments)))
    finally:
        dist.destroy_process_group()


def _peak_mb(before: Callable[[], Any], step: Callable[[Any], object]) -> float:
    """MB by which the resident memory grows at most in ``step`` of what ``before`` made."""
    made = before()
    gc.collect()
    give_back()
    start = resident_bytes(os.getpid())
    if start is None or not reset_high_water(os.getpid()):
        raise RuntimeError("this system does not tell the memory of a process: measure on Linux")
    step(made)
    return (high_water(os.getpid()) - start) / BYTES_PER_MB


def _piece(config: dict[str, Any], tokens: int) -> float:
    model = new_model(ModelConfig.from_dict(config), 0)

    def step(length: int) -> None:
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length + 1)))
        with context_parallel(model):
            _, loss = model(piece_of(ids[:, :-1]), piece_of(ids[:, 1:]), return_logits=False)
            assert loss is not None
            loss.backward()

    step(64 * dist.get_world_size())  # what the libraries take once
    return _peak_mb(lambda: tokens, step)


def _steps(config: dict[str, Any], recipe: dict[str, Any], shard: bool) -> float:
    plan = TrainConfig.from_dict(recipe)
    world = World.current()

    def run(config: ModelConfig) -> None:
        model = new_model(config, 0)
        if shard:
            shard_model(model, torch.device("cpu"))
            gc.collect()
            give_back()
            reset_high_water(os.getpid())  # the whole model, which was there for a moment, is not of the steps
        parallel, optimizer = DataParallel(model, world), make_optimizer(model, plan, world.size)
        rng = np.random.default_rng(0)
        for _ in range(3):
            tokens = rng.integers(0, config.vocab_size, (plan.batch_size, plan.context + 1))
            train_step(model, optimizer, (tokens[:, :-1].copy(), tokens[:, 1:].copy()), plan, 1e-3, torch.float32, parallel)

    made = ModelConfig.from_dict(config)
    run(made.replace(num_hidden_layers=1))  # what the libraries take once
    return _peak_mb(lambda: made, run)
