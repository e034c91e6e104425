"""The official weights: state dicts of the published GAM and of its Transformer baseline, as models of this library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.presets.models import named_model

# Official name → ours. A block's names follow `blocks.{i}.`, ours `layers.{i}.`.
MODEL_NAMES = {
    "token_embedding.weight": "embed_tokens.weight",
    "pos_embedding.weight": "embed_positions.weight",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
    "head.weight": "lm_head.weight",
}
FFN_NAMES = {f"ffn.{i}.{kind}": f"mlp.{name}.{kind}" for i, name in ((0, "up_proj"), (2, "down_proj")) for kind in ("weight", "bias")}
GAM_BLOCK_NAMES = FFN_NAMES | {
    "causal_conv.weight": "mixer.conv.weight",
    "causal_conv.bias": "mixer.conv.bias",
    "memory_bank": "mixer.memory.bank",
    "gate.weight": "mixer.gate.weight",
    "gate.bias": "mixer.gate.bias",
    **{f"ln{i}.{kind}": f"{name}.{kind}" for i, name in ((1, "mixer_norm"), (2, "mlp_norm")) for kind in ("weight", "bias")},
}
TRANSFORMER_BLOCK_NAMES = FFN_NAMES | {
    **{
        f"attn.{theirs}.{kind}": f"mixer.{ours}.{kind}"
        for theirs, ours in (("c_attn", "qkv_proj"), ("c_proj", "out_proj"))
        for kind in ("weight", "bias")
    },
    **{f"ln_{i}.{kind}": f"{name}.{kind}" for i, name in ((1, "mixer_norm"), (2, "mlp_norm")) for kind in ("weight", "bias")},
}
IGNORED = re.compile(r"blocks\.\d+\.attn\.bias")  # the baseline's causal mask, a buffer


def reference_name(name: str) -> str | None:
    """Our name for an official parameter, None for one that is no weight, InputError for one that neither official model has."""
    if IGNORED.fullmatch(name):
        return None
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    names = GAM_BLOCK_NAMES | TRANSFORMER_BLOCK_NAMES
    if match is None or match[2] not in names:
        raise InputError(f"weights hold {name!r}, which neither the official GAM nor its Transformer has: pass an official state dict")
    return f"layers.{match[1]}.{names[match[2]]}"


def load_reference(weights: Mapping[str, Tensor] | str | Path, num_heads: int | None = None) -> LanguageModel:
    """Build the model that an official state dict belongs to.

    Args:
        weights: the state dict, or the path of a .safetensors file with it.
        num_heads: heads of the Transformer, which its weights do not tell; not used for GAM.

    Returns:
        A model in evaluation mode with dropout 0, its sizes read from the shapes, its dtype that of the weights.

    Raises:
        InputError: for a missing file, a name or shape that is not official, or a Transformer without ``num_heads``.
    """
    if isinstance(weights, (str, Path)):
        if not Path(weights).is_file():
            raise InputError(f"weights is {str(weights)!r}: there is no such file")
        weights = load_file(weights)
    own = {ours: tensor for name, tensor in weights.items() if (ours := reference_name(name)) is not None}
    for name in ("embed_tokens.weight", "embed_positions.weight", "layers.0.mlp.up_proj.weight"):
        if name not in own:
            raise InputError(f"weights lack {name!r} under its official name: pass a whole official state dict")
    if "layers.0.mixer.conv.weight" in own:
        own |= {name: tensor.squeeze(1) for name, tensor in own.items() if name.endswith("mixer.conv.weight")}
    model = LanguageModel(_config(own, num_heads)).to(own["embed_tokens.weight"].dtype)
    own.setdefault("lm_head.weight", own["embed_tokens.weight"])
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise InputError(f"weights do not fit the official model: {str(error).splitlines()[-1].strip()}") from error
    return model.eval()


def _config(own: Mapping[str, Tensor], num_heads: int | None) -> ModelConfig:
    vocab_size, hidden_size = own["embed_tokens.weight"].shape
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in own if name.startswith("layers.")),
        "intermediate_size": len(own["layers.0.mlp.up_proj.weight"]),
        "max_position_embeddings": len(own["embed_positions.weight"]),
    }
    if "layers.0.mixer.qkv_proj.weight" in own:
        if num_heads is None:
            raise InputError("num_heads is not given: the weights of a Transformer do not tell it (the published one has 8)")
        return named_model(f"transformer-paper+num_heads={num_heads}", sizes)
    if "layers.0.mixer.memory.bank" not in own or "layers.0.mixer.conv.weight" not in own:
        raise InputError("weights have neither attn.c_attn nor memory_bank and causal_conv: pass an official state dict")
    taps, slots = own["layers.0.mixer.conv.weight"].shape[1], len(own["layers.0.mixer.memory.bank"])
    return named_model(f"gam-paper+conv_kernel_size={taps}+num_memory_slots={slots}", sizes)
