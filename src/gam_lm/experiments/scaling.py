"""Table 2: time and memory of one block against the length of the sequence.

Every cell, one model at one length, runs in a process of its own with a memory and a time limit; what runs out of either is a row as well. All models
of one length run back to back.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gam_lm.config import ModelConfig
from gam_lm.experiments.accuracy import block_errors
from gam_lm.experiments.measuring import Group, Limits, Row, measure_missing
from gam_lm.experiments.models import block_contender, block_parameters, build_blocks, described
from gam_lm.presets.models import Fields
from gam_lm.results import Results
from gam_lm.runtime.isolation import Isolated, Peak
from gam_lm.runtime.measure import BYTES_PER_MB, cuda_peak_bytes, step_times
from gam_lm.training.precision import autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Protocol(Limits):
    """How a cell is measured."""

    batch_size: int = 1
    """B."""
    dtype: str = "fp32"
    """Format of the products under autocast: fp32 (none), bf16 or fp16."""
    compiled: bool = False
    """Whether the block runs through torch.compile."""
    iterations: int = 20
    """Passes that are timed."""
    accuracy: bool = False
    """Whether each cell says its largest error against float64 (gam_lm.experiments.accuracy)."""
    seconds: float | None = None
    """The most that warm-up, forward passes and training passes may take, each; one pass of either is always made."""


def scale(
    models: Sequence[str],
    lengths: Sequence[int],
    base: Fields,
    protocol: Protocol,
    results: Results,
    device: torch.device,
    *,
    isolated: bool = True,
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Measure what is missing in ``results``, length by length; each finished cell is written at once.

    Args:
        models: names of gam_lm.presets.models, or hf:<model_type>.
        lengths: T, in any order.
        base: what the models share; a block of it is measured.
        protocol: how.
        results: an open results.json.
        device: where.
        isolated: False measures within this process: quicker where the device itself survives running out of memory, without a time limit and
            without the memory of a CPU.
        go_on: asked before each cell; False ends the analysis, to be gone on with later.
    """
    configs = dict(block_contender(name, base) for name in models)
    rows = [_row(name, T, config, protocol, device) for T in sorted(dict.fromkeys(lengths)) for name, config in configs.items()]
    given = {"iterations": protocol.iterations, "seconds": protocol.seconds, "accuracy": protocol.accuracy}

    def measure(missing: Sequence[Row]) -> Iterator[tuple[Row, Isolated]]:
        for row in missing:
            yield row, protocol.measured(measure_block, row | given, device, isolated=isolated)

    cells = [Group(label=_name_of(row), rows=[row]) for row in rows]
    measure_missing("scaling", "cells", cells, measure, _name_of, _words, results, go_on)


def _row(name: str, T: int, config: ModelConfig, protocol: Protocol, device: torch.device) -> Row:
    """What tells a cell from the others."""
    return {
        "model": name, **described(config, device), "sequence_length": T,
        "batch_size": protocol.batch_size, "dtype": protocol.dtype, "variant": "compiled" if protocol.compiled else "eager",
    }  # fmt: skip


def _name_of(row: Row) -> str:
    return f"{row['model']} T={row['sequence_length']}"


def _words(row: Row) -> str:
    memory = f", {row['peak_memory_mb']:,.0f} MB" if "peak_memory_mb" in row else ""
    return f"forward {row['forward_ms']:.1f} ms, with backward {row['forward_backward_ms']:.1f} ms{memory}"


def measure_block(parameters: Mapping[str, Any], peak: Peak) -> dict[str, Any]:
    """One cell: ``parameters``, ``forward_ms``, ``forward_backward_ms`` (medians) and ``peak_memory_mb``; the errors where they are asked for.

    The memory is that of one forward and backward pass: on a GPU all that the allocator holds at most, on a CPU the growth of the process. Forward
    passes keep nothing for gradients. Where layers of several kinds take turns, the figures are the mean over one turn.
    """
    device, dtype = torch.device(parameters["device"]), DTYPES[parameters["dtype"]]
    T, B = parameters["sequence_length"], parameters["batch_size"]
    torch.manual_seed(0)
    config = ModelConfig.from_dict(parameters["model_config"])
    block, blocks = build_blocks(config, T)
    block.to(device)
    run: Any = block
    if parameters["variant"] == "compiled":
        torch.compiler.reset()  # what was compiled for another cell counts towards a limit, beyond which a block would stay eager
        run = torch.compile(block, dynamic=False)
    D = config.hidden_size

    def passes() -> tuple[Callable[[], object], Callable[[], object]]:
        x_BTD = torch.randn(B, T, D, device=device, requires_grad=True)
        slope_BTD = torch.randn(B, T, D, device=device)

        def forward() -> None:
            with torch.no_grad(), autocast(device, dtype):
                run(x_BTD, None, None)

        def forward_backward() -> None:
            with autocast(device, dtype):
                y_BTD, _ = run(x_BTD, None, None)
            y_BTD.backward(slope_BTD.to(y_BTD.dtype))
            x_BTD.grad = None
            block.zero_grad(set_to_none=True)

        return forward, forward_backward

    forward, forward_backward = passes()
    warmup, timing = parameters["warmup"], {name: parameters[name] for name in ("iterations", "seconds")}
    errors = {}
    if parameters["accuracy"]:
        with autocast(device, dtype):
            errors = block_errors(run, block, config, torch.randn(B, T, D, device=device))
    both_ms = step_times(forward_backward, device, warmup=warmup, **timing)
    forward_ms = step_times(forward, device, warmup=warmup, **timing)
    grown = cuda_peak_bytes(forward_backward, device) if device.type == "cuda" else peak(forward_backward)  # last: it gives the heap back
    figures = {
        "parameters": block_parameters(config), "forward_ms": statistics.median(forward_ms) / blocks,
        "forward_backward_ms": statistics.median(both_ms) / blocks, "passes": len(both_ms), **errors,
    }  # fmt: skip
    return figures if grown is None else figures | {"peak_memory_mb": grown / BYTES_PER_MB / blocks}
