"""The official weights: state dicts of the published GAM and of its Transformer baseline, as models of this library."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.presets.models import named_model
from gam_lm.runtime.files import explained

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

WRAPPED = re.compile(r"^(?:_orig_mod\.|module\.)+")  # what torch.compile and DistributedDataParallel put before names
SHARED = ("embed_tokens.weight", "lm_head.weight")
PICKLED = (".pt", ".pth", ".bin")


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


def official_name(name: str, *, transformer: bool = False) -> str:
    """The official name of a parameter of ours, in the GAM or in its Transformer. Raises KeyError where there is none."""
    own, other = (TRANSFORMER_BLOCK_NAMES, GAM_BLOCK_NAMES) if transformer else (GAM_BLOCK_NAMES, TRANSFORMER_BLOCK_NAMES)
    if not name.startswith("layers."):
        return {ours: theirs for theirs, ours in MODEL_NAMES.items()}[name]
    _, layer, rest = name.split(".", 2)
    return f"blocks.{layer}." + {ours: theirs for names in (other, own) for theirs, ours in names.items()}[rest]


def load_reference(weights: Mapping[str, Tensor] | nn.Module | str | Path, num_heads: int | None = None) -> LanguageModel:
    """Build the model that official weights belong to.

    Args:
        weights: a state dict, a module that has one, or the path of a file with it: .safetensors, or a .pt that ``torch.save`` wrote, which is read by torch's
            weights-only loader. The prefixes of torch.compile and DistributedDataParallel may stand before the names, and of embedding and head, which share
            a weight, one alone may be there.
        num_heads: heads of the Transformer, which its weights do not tell; not used for GAM.

    Returns:
        A model in evaluation mode with dropout 0, its sizes read from the shapes, its dtype that of the weights.

    Raises:
        InputError: for a file that is missing or no state dict, a name or shape that is not official, or a Transformer without ``num_heads``.
    """
    if isinstance(weights, (str, Path)):
        weights = _read(Path(weights))
    elif isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) and isinstance(each, Tensor) for name, each in weights.items()):
        raise InputError("weights hold something else than tensors by name: pass an official state dict")
    official = {WRAPPED.sub("", name): tensor for name, tensor in weights.items()}
    own = {ours: tensor for name, tensor in official.items() if (ours := reference_name(name)) is not None}
    transformer = any(".attn." in name for name in official)
    for name, other in (SHARED, SHARED[::-1]):
        if other in own:
            own.setdefault(name, own[other])
    for name in ("embed_tokens.weight", "embed_positions.weight", "layers.0.mlp.up_proj.weight"):
        if name not in own:
            raise InputError(f"weights lack {official_name(name, transformer=transformer)!r}: pass a whole official state dict")
    own |= {name: tensor.squeeze(1) for name, tensor in own.items() if name.endswith("mixer.conv.weight") and tensor.dim() == 3}
    _check_tensors(own, transformer)
    model = LanguageModel(_config(own, num_heads)).to(own["embed_tokens.weight"].dtype)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in expected.keys() - own.keys():
        raise InputError(f"weights lack {official_name(name, transformer=transformer)!r}: pass a whole official state dict")
    for name, tensor in own.items():
        if name not in expected:
            raise InputError(f"weights hold {official_name(name, transformer=transformer)!r}, which does not belong to the model of the other names: pass an official state dict")
        if tensor.shape != expected[name]:
            shapes = f"of shape {tuple(tensor.shape)}, the others want {tuple(expected[name])}"
            raise InputError(f"weights hold {official_name(name, transformer=transformer)!r} {shapes}: pass an official state dict")
    if not torch.equal(*(own[name] for name in SHARED)):
        raise InputError("weights hold different 'token_embedding.weight' and 'head.weight', which the official models share: pass an official state dict")
    model.load_state_dict(own)
    return model.eval()


def _read(path: Path) -> Any:
    """What a file of weights holds. Raises InputError where it cannot be read."""
    if not path.is_file():
        raise InputError(f"weights is {str(path)!r}: there is no such file")
    try:
        with explained(path, "read"):
            return torch.load(path, map_location="cpu", weights_only=True) if path.suffix in PICKLED else load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights is {str(path)!r}, which holds no plain state dict ({reason}): save model.state_dict() alone") from error


def _check_tensors(own: Mapping[str, Tensor], transformer: bool) -> None:
    """What reading sizes from the tensors takes for granted."""
    for name, tensor in own.items():
        called = repr(official_name(name, transformer=transformer))
        matrix = name in SHARED or name.endswith(("embed_positions.weight", "proj.weight", "memory.bank", "conv.weight"))
        if not tensor.is_floating_point():
            raise InputError(f"weights hold {called} in {str(tensor.dtype).removeprefix('torch.')}: pass an official state dict, of floating-point numbers")
        if matrix and tensor.dim() != 2:
            raise InputError(f"weights hold {called} of shape {tuple(tensor.shape)}, which is no matrix: pass an official state dict")
    layers = {name.split(".")[1] for name in own if name.startswith("layers.")}
    for i in range(len(layers)):
        if str(i) not in layers:
            raise InputError(f"weights hold {len(layers)} blocks, and no blocks.{i}: pass a whole official state dict")


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
