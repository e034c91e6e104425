"""What a model costs: parameters by part, operations per token, memory per token, and the state; for a model as it is and for larger ones of its kind.

A mixer says what it costs (``Mixer.cost``); the rest is the same for all. One multiply-add is two operations. The backward pass computes two products for each
of the forward pass, so that training takes three times the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.base import Cost
from gam_lm.mixers.registry import mixer_class

SIZES: Mapping[str, tuple[float, int]] = {"1 B": (1e9, 2048), "7 B": (7e9, 4096)}
"""Larger models: parameters to come near to, and the width."""

POSITION_BYTES = 8
"""Of a sequence's count of tokens."""

CONTEXTS = (256, 1024, 8192, 131_072, 1_048_576)

BYTES_PER_PARAMETER = 16
"""Of training in fp32 with AdamW: weight, gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model costs at a context, for one sequence."""

    parameters: Mapping[str, int]
    """By part: embedding, positions, mixers, feed-forward networks, norms, and an output head that is not tied."""
    forward_flops: float
    """Operations of a forward pass per token, averaged over the context."""
    decode_flops: float
    """Operations for one more token after the context."""
    activation_bytes: float
    """Bytes kept per token for the backward pass, in fp32; what the number of tokens does not change (the head's gradient) is left out."""
    state_bytes: int
    """Bytes carried from token to token after the context, memories and caches in fp32."""

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def training_flops(self) -> float:
        """Operations of forward and backward pass per token."""
        return 3 * self.forward_flops

    def training_bytes(self, tokens: int) -> float:
        """Memory of a training step in fp32 over ``tokens`` tokens: weights, gradients, AdamW's moments, activations."""
        return BYTES_PER_PARAMETER * self.total_parameters + self.activation_bytes * tokens


def model_cost(config: ModelConfig, context: int) -> ModelCost:
    """The cost of the model that ``config`` describes at ``context`` tokens. Raises InputError where its positions end before that."""
    config.check_length("context", context)
    D, V = config.hidden_size, config.vocab_size
    layers = [_layer_cost(config, name, context) for name in config.layer_mixers]
    head = 2 * V * D
    dropout = config.dropout > 0
    ends = (D + 2) + D + 2 + D * dropout  # the last norm, the head's gradient, two ids, the noise of the dropout
    norm = D * (2 if config.norm == "layer" else 1)
    return ModelCost(
        parameters={
            "embedding": V * D,
            "positions": (config.longest or 0) * D,
            "mixers": sum(each.mixer.parameters for each in layers),
            "feed-forward networks": sum(each.network_parameters for each in layers),
            "norms": norm * (sum(each.norms for each in layers) + 1),
            "output head": V * D * (not config.tie_word_embeddings),
        },
        forward_flops=sum(each.mixer.forward_flops + each.network_flops for each in layers) + head,
        decode_flops=sum(each.mixer.decode_flops + each.network_flops for each in layers) + head,
        activation_bytes=4 * (sum(each.activations for each in layers) + ends),
        state_bytes=sum(each.mixer.state_bytes for each in layers) + POSITION_BYTES,
    )


class _LayerCost(NamedTuple):
    """One block."""

    mixer: Cost
    norms: int
    network_parameters: int
    network_flops: int
    activations: float


def _layer_cost(config: ModelConfig, name: str, context: int) -> _LayerCost:
    kind = mixer_class(name)
    mixer = kind.cost(config, context)
    D, F = config.hidden_size, config.feed_forward_size(config.options_of(kind.options_type))
    norms = (config.stack == "residual") + bool(F)
    gated = config.mlp == "swiglu"
    # A norm keeps its input, mean and deviation; the network its input, and what goes into and comes out of the activation function.
    network = bool(F) * (D + (4 if gated else 2) * F + D * (config.dropout > 0))
    return _LayerCost(
        mixer, norms, bool(F) * (3 * D * F if gated else 2 * D * F + F + D), (6 if gated else 4) * D * F, mixer.activations + norms * (D + 2) + network
    )


def enlarged(config: ModelConfig, parameters: float, width: int) -> ModelConfig:
    """A model of the same kind with about ``parameters``: everything that grows with the width does, heads keep their size, the depth fills up the rest.

    Learned positions are left out, so that any context is allowed.
    """
    ratio = width / config.hidden_size
    config = config.replace(
        hidden_size=width,
        intermediate_size=None if config.intermediate_size is None else round(config.intermediate_size * ratio),
        options=tuple(each.enlarged(ratio) for each in config.options),
        positions="none",
    )

    def count(layers: int) -> int:
        return model_cost(config.replace(num_hidden_layers=layers), 1).total_parameters

    turn = len(config.mixers)
    about = max(1, round(turn * (1 + (parameters - count(turn)) / (count(2 * turn) - count(turn)))))
    nearest = min(range(max(1, about - turn), about + turn + 1), key=lambda layers: abs(count(layers) - parameters))
    return config.replace(num_hidden_layers=nearest)


def cost_report(config: ModelConfig, contexts: Sequence[int] = CONTEXTS) -> dict[str, Any]:
    """The cost at each context, as it is and enlarged: JSON values by size, ``{"as it is": {"model_config", "parameters", "contexts": [...]}, …}``.

    Contexts beyond learned positions are left out. Raises InputError for a context below 1.
    """
    if not contexts or min(contexts) < 1:
        raise InputError(f"context is {min(contexts, default=None)}: use whole numbers of at least 1")
    models = {"as it is": config} | {name: enlarged(config, *size) for name, size in SIZES.items()}
    return {name: _report(each, contexts) for name, each in models.items()}


def _report(config: ModelConfig, contexts: Sequence[int]) -> dict[str, Any]:
    limit = config.longest or math.inf
    rows = []
    for context in sorted({*contexts}):
        if context > limit:
            continue
        cost = model_cost(config, context)
        rows.append({
            "context": context, "forward_flops_per_token": cost.forward_flops, "training_flops_per_token": cost.training_flops,
            "decode_flops_per_token": cost.decode_flops, "activation_bytes_per_token": cost.activation_bytes, "state_bytes": cost.state_bytes,
        })  # fmt: skip
    return {"model_config": config.to_dict(), "parameters": dict(model_cost(config, 1).parameters), "contexts": rows}


def explain(report: Mapping[str, Any]) -> str:
    """The report as tables in Markdown."""
    parts = []
    for name, each in report.items():
        config = each["model_config"]
        total = sum(each["parameters"].values())
        counts = ", ".join(f"{part} {count:,}" for part, count in each["parameters"].items() if count)
        parts.append(f"{name}: {total:,} parameters ({config['num_hidden_layers']} layers of width {config['hidden_size']}): {counts}\n")
        lines = [
            "| Context | Training (MFLOP/token) | Forward (MFLOP/token) | Decode (MFLOP/token) | Activations (KB/token) | State (KB) |",
            "|--:|--:|--:|--:|--:|--:|",
        ]
        for row in each["contexts"]:
            flops = (f"{row[f'{kind}_flops_per_token'] / 1e6:,.1f}" for kind in ("training", "forward", "decode"))
            cells = [f"{row['context']:,}", *flops, f"{row['activation_bytes_per_token'] / 1024:,.1f}", f"{row['state_bytes'] / 1024:,.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
        if config["positions"] == "learned":
            parts.append(f"Learned positions end at {config['max_position_embeddings']:,} tokens.\n")
    return "\n".join(parts)
