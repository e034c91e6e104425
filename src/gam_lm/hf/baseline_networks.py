"""The networks of transformers that stand behind a baseline: a type's own configuration class, told the sizes of a ModelConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.hf.baseline_options import BaselineOptions
from gam_lm.presets.models import BASELINE as PREFIX


def build(config: ModelConfig) -> Any:
    """The network with its own random initialisation, drawn from torch's global generator. Raises InputError where it does not build at this size."""
    described = transformers_config(config)
    try:
        return AutoModelForCausalLM.from_config(described, dtype=torch.get_default_dtype())
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise _does_not_build(config, error) from error


def transformers_config(config: ModelConfig) -> Any:
    """The configuration of the type: its own defaults, but for what ``config`` says.

    Raises:
        InputError: where the type does not allow it.
    """
    kind = config.mixers[0].removeprefix(PREFIX)
    fields, names = type_fields(kind), getattr(CONFIG_MAPPING[kind], "attribute_map", {})
    options = config.options_of(BaselineOptions)
    heads = options.num_heads or 1
    wanted: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
        str(inner_width_name(kind)): config.intermediate_size, "num_attention_heads": heads, "head_dim": config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings, "state_size": options.state_size, "chunk_size": options.chunk_size,
        "tie_word_embeddings": config.tie_word_embeddings, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        "final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0,
    }  # fmt: skip
    if config.initialization == "fan_in":  # one number for all matrices: exact for those that the stream enters, and for the embedding
        wanted["initializer_range"] = config.hidden_size**-0.5
    if fields.get("num_key_value_heads"):
        wanted["num_key_value_heads"] = max(1, heads * fields["num_key_value_heads"] // fields["num_attention_heads"])
    for name in fields:
        if "dropout" in name or name.endswith("pdrop"):
            wanted[name] = 0.0 if name.startswith(("attention", "attn")) else config.dropout
    wanted |= OWN_SIZES.get(kind, lambda _: {})(config)
    try:
        return CONFIG_MAPPING[kind](**{names.get(name, name): value for name, value in wanted.items() if names.get(name, name) in fields})
    except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
        raise _does_not_build(config, error) from error


def count(config: ModelConfig) -> int:
    """Parameters, the shared weight counted once, without allocating them."""
    return _counted(config.replace(dropout=0.0))


@lru_cache(maxsize=4096)
def _counted(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


def on_meta(config: ModelConfig) -> Any:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build(config)


@lru_cache
def type_fields(kind: str) -> dict[str, Any]:
    """The fields of a type's configuration with their defaults."""
    default = CONFIG_MAPPING[kind]()
    return {field.name: getattr(default, field.name, None) for field in dataclasses.fields(default)}


def inner_width_name(kind: str) -> str | None:
    """What a type calls the width of its feed-forward network; None where it has no such field."""
    return next((name for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") if name in type_fields(kind)), None)


def _mamba2(config: ModelConfig) -> dict[str, Any]:
    """Heads of 64 channels as published, or at least two."""
    channels = 2 * config.hidden_size
    heads = max(2, channels // 64)
    while channels % heads:
        heads -= 1
    return {"num_heads": heads, "head_dim": channels // heads, "n_groups": 1}


def _lfm2(config: ModelConfig) -> dict[str, Any]:
    """Two convolutions to one attention, about as in the published models; below three layers the last one is attention."""
    layers = config.num_hidden_layers
    return {"full_attn_idxs": list(range(2, layers, 3)) or [layers - 1], "block_auto_adjust_ff_dim": False}


def _qwen3_next(config: ModelConfig) -> dict[str, Any]:
    """Gated delta rule and attention three to one, dense instead of 512 experts, heads as narrow as those of attention."""
    heads = config.options_of(BaselineOptions).num_heads or 1
    width = config.hidden_size // heads
    return {
        "num_experts": 0, "linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_key_head_dim": width, "linear_value_head_dim": width,
    }  # fmt: skip


OWN_SIZES: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {"mamba2": _mamba2, "lfm2": _lfm2, "qwen3_next": _qwen3_next}
"""Sizes that follow from the width in another way than through fields of the same name."""


def _does_not_build(config: ModelConfig, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"model {config.mixers[0]!r} does not build at hidden_size={config.hidden_size}, num_heads={config.options_of(BaselineOptions).num_heads}: {reason}"
    )
