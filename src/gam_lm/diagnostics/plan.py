"""A training on many GPUs on paper: memory by part, time, and communication against computation. An estimate from the cost model, not a measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import ModelCost, enlarged, model_cost
from gam_lm.errors import InputError, unknown_name

GPUS_PER_NODE = 8

ROOM = 0.9
"""Share of a GPU's memory that a step may take; the rest is for the allocator's gaps and the libraries."""

WEIGHTS, GRADIENTS, MOMENTS, COPIES = 4, 4, 8, 2
"""Bytes a parameter: fp32 weights, fp32 gradients, AdamW's two fp32 moments, the bf16 weights of autocast."""


class Device(NamedTuple):
    """A GPU as its maker describes it."""

    name: str
    flops: float
    """Dense bf16 operations a second."""
    memory: float
    """Bytes."""
    inside: float
    """Bytes a second to the other GPUs of its machine, in one direction."""
    outside: float
    """Bytes a second to other machines, in one direction."""


DEVICES: Mapping[str, Device] = {
    "a100": Device("A100 SXM 80 GB", 312e12, 80e9, 300e9, 25e9),
    "h100": Device("H100 SXM", 989e12, 80e9, 450e9, 50e9),
    "h200": Device("H200 SXM", 989e12, 141e9, 450e9, 50e9),
    "b200": Device("B200", 2250e12, 180e9, 900e9, 50e9),
}
"""Data sheets; one network card of 200 Gb/s (A100) or 400 Gb/s a GPU."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be trained, on what."""

    config: ModelConfig
    tokens: float
    """Of the training."""
    gpus: int
    device: Device
    context: int = 4096
    """Tokens a sequence."""
    tokens_per_step: float = 2**20
    """Tokens an optimiser step."""
    utilisation: float = 0.4
    """Share of the GPU's peak that a step reaches."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    state: float
    """Weights, gradients, moments and bf16 copies."""
    activations: float
    """Of one micro-batch."""
    rows: int
    """Sequences of a micro-batch; 0 where not even one fits."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the plan takes."""

    cost: ModelCost
    rows_per_gpu: int
    """Sequences of a step on one GPU."""
    replicated: Memory
    """Data parallel: every GPU holds everything."""
    sharded: Memory
    """Weights, gradients and moments spread over all GPUs, one block at a time gathered."""
    seconds_per_step: float
    """Computation."""
    exchange_seconds: float
    """Summing the fp32 gradients of a step in a ring over the slowest link."""

    def days(self, plan: Plan) -> float:
        """Of the training; what of the exchange the backward pass does not hide comes on top of the computation."""
        return plan.tokens / plan.tokens_per_step * (self.seconds_per_step + self.exposed_seconds) / 86_400

    @property
    def exposed_seconds(self) -> float:
        """The part of the exchange that is longer than the backward pass, two thirds of the computation."""
        return max(0.0, self.exchange_seconds - 2 / 3 * self.seconds_per_step)


def of_size(config: ModelConfig, parameters: float) -> ModelConfig:
    """A model of the kind of ``config`` with about as many parameters; the width grows with their cube root, from 2,048 at a billion."""
    return enlarged(config, parameters, 256 * max(1, round(8 * (parameters / 1e9) ** (1 / 3))))


def number(field: str, text: str) -> float:
    """``1B``, ``350M``, ``2.5T``, ``4096`` as a number. Raises InputError for anything else."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e18:
        raise InputError(f"{field} is {text!r}: use a number such as 350M, 1B or 100B")
    return value


def device_called(name: str) -> Device:
    """A device by its short name. Raises InputError for an unknown one."""
    if name.lower() not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    return DEVICES[name.lower()]


def estimate(plan: Plan) -> Estimate:
    """What ``plan`` takes.

    Raises:
        InputError: for numbers that make no plan.
    """
    if plan.gpus < 1:
        raise InputError(f"gpus is {plan.gpus}: use a whole number of at least 1")
    if not 0 < plan.utilisation <= 1:
        raise InputError(f"utilisation is {plan.utilisation}: use a share above 0 and at most 1")
    rows = int(plan.tokens_per_step // (plan.gpus * plan.context))
    if rows < 1:
        raise InputError(
            f"tokens_per_step is {plan.tokens_per_step:,.0f} for {plan.gpus} GPUs of context {plan.context}: use at least {plan.gpus * plan.context:,}"
        )
    cost = model_cost(plan.config, plan.context)
    count = cost.total_parameters
    replicated, sharded = held_bytes(plan.config, plan.context, plan.gpus)
    link = plan.device.inside if plan.gpus <= GPUS_PER_NODE else plan.device.outside
    return Estimate(
        cost=cost,
        rows_per_gpu=rows,
        replicated=_memory(plan, replicated, cost, rows),
        sharded=_memory(plan, sharded, cost, rows),
        seconds_per_step=cost.training_flops * plan.tokens_per_step / (plan.gpus * plan.device.flops * plan.utilisation),
        exchange_seconds=2 * (plan.gpus - 1) / plan.gpus * GRADIENTS * count / link,
    )


def held_bytes(config: ModelConfig, context: int, processes: int, *, copies: int = COPIES) -> tuple[float, float]:
    """Bytes that a process holds besides activations: where everything is whole on each, and where it is spread over them.

    Spread, a process has its share, the embedding and the head whole with their gradient, and of two blocks the weights (the one at work and the next), of
    one the gradient, once as it is made and once as it is sent.

    Args:
        config: of the model.
        context: tokens of a sequence.
        processes: GPUs.
        copies: bytes a parameter of copies in the format of the products; 0 in fp32.
    """
    cost = model_cost(config, context)
    count = cost.total_parameters
    outside = cost.parameters["embedding"] + cost.parameters["output head"]
    block = (count - outside) / max(1, config.num_hidden_layers)
    state = WEIGHTS + GRADIENTS + MOMENTS
    gathered = (WEIGHTS + GRADIENTS + copies) * outside + (2 * WEIGHTS + 2 * GRADIENTS + copies) * block
    return (state + copies) * float(count), state * count / processes + gathered * (processes > 1)


def _memory(plan: Plan, state: float, cost: ModelCost, rows: int) -> Memory:
    row = cost.activation_bytes * plan.context
    room = ROOM * plan.device.memory - state
    fit = min(rows, int(room // row)) if room >= row else 0
    while fit and rows % fit:  # parts of one size
        fit -= 1
    return Memory(state=state, activations=max(1, fit) * row, rows=fit)


def describe(plan: Plan, found: Estimate) -> str:
    """The estimate and what it assumes, as Markdown."""
    config, device = plan.config, plan.device
    tokens_per_step = found.rows_per_gpu * plan.gpus * plan.context
    lines = [
        f"{found.cost.total_parameters:,} parameters ({config.num_hidden_layers} layers of width {config.hidden_size}), {plan.tokens:,.0f} tokens "
        f"of context {plan.context:,}, {plan.gpus} × {device.name}.\n",
        "| Memory of a GPU (GB) | Data parallel | Sharded |", "|:--|--:|--:|",
        *(f"| {name} | {a / 1e9:,.1f} | {b / 1e9:,.1f} |" for name, a, b in (
            ("weights, gradients, moments", found.replicated.state, found.sharded.state),
            ("activations of a micro-batch", found.replicated.activations, found.sharded.activations),
        )),
        f"| sequences of a micro-batch | {found.replicated.rows or 'does not fit'} | {found.sharded.rows or 'does not fit'} |",
        f"| room | {ROOM * device.memory / 1e9:,.1f} | {ROOM * device.memory / 1e9:,.1f} |\n",
        "| A step | |", "|:--|--:|",
        f"| tokens | {tokens_per_step:,} |",
        f"| sequences on a GPU | {found.rows_per_gpu} |",
        f"| computation (s) | {found.seconds_per_step:,.3f} |",
        f"| exchange of gradients (s) | {found.exchange_seconds:,.3f} |",
        f"| of which the backward pass does not hide (s) | {found.exposed_seconds:,.3f} |\n",
        f"Training: {found.days(plan):,.2f} days, {found.days(plan) * 24 * plan.gpus:,.0f} GPU-hours.\n",
        _advice(plan, found) + "\n",
        "Assumed, not measured:\n",
        f"* {plan.utilisation:.0%} of the peak of {device.flops / 1e12:,.0f} TFLOP/s in bf16; the forward pass counts once, the backward pass twice.",
        f"* {WEIGHTS} + {GRADIENTS} + {MOMENTS} + {COPIES} bytes a parameter: fp32 weights, gradients and AdamW's moments, bf16 copies.",
        "* Activations as in fp32, which is an upper bound under bf16; nothing is recomputed.",
        f"* A ring over {device.inside / 1e9:,.0f} GB/s within a machine of {GPUS_PER_NODE}, or {device.outside / 1e9:,.0f} GB/s a GPU between machines.",
        "* Reading data, validation, checkpoints and failures take no time.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _advice(plan: Plan, found: Estimate) -> str:
    if found.replicated.rows:
        parts = math.ceil(found.rows_per_gpu / found.replicated.rows)
        return f"Data parallel fits: `--accumulate {parts * plan.gpus}` makes parts of {found.replicated.rows} sequences on every GPU."
    if found.sharded.rows:
        parts = math.ceil(found.rows_per_gpu / found.sharded.rows)
        return f"Data parallel does not fit: `--shard` spreads weights, gradients and moments, `--accumulate {parts * plan.gpus}` makes parts of {found.sharded.rows} sequences."
    return "Not even one sequence fits a GPU: use a shorter context, more GPUs for a sequence (context parallelism), or a smaller model."
