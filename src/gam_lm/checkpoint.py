"""The run directory, which is a Hugging Face model directory.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json      the model, for whoever loads it
    recipe.json  metrics.jsonl  results.json                                   how it was trained
    state/step-N/                                                              what a killed run goes on from, see gam_lm.training.state

No pickle is ever written or loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gam_lm.config import MODEL_TYPE, ModelConfig
from gam_lm.errors import InputError
from gam_lm.inference.int8 import check_method, is_int8, quantization_config, quantize_int8
from gam_lm.mixers.registry import log_backends
from gam_lm.model import LanguageModel
from gam_lm.runtime.files import explained, replacing, write_text
from gam_lm.runtime.tensor_files import save_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFIX = "model."  # what Hugging Face puts before the names of everything but the head


def save_model(directory: Path | str, model: LanguageModel, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and, when given, the tokenizer, each whole or not at all.

    The shared weight of embedding and head is written once. A model of somebody else's, which has a ``write_to``, writes its own two files.
    """
    directory, token_ids = Path(directory), dict[str, int]()
    if tokenizer is not None:
        ids = {role: tokenizer.token_to_id(token) for role, token in _special_tokens(tokenizer).items()}
        token_ids = {f"{role}_id": number for role in ("bos_token", "eos_token", "pad_token") if (number := ids.get(role)) is not None}
    write: Callable[[Path, dict[str, int]], None] = getattr(model, "write_to", partial(_write_model, model))
    write(directory, token_ids)
    if tokenizer is not None:
        _write_if_new(directory / "tokenizer.json", tokenizer.to_str(pretty=False))
        _write_if_new(directory / "tokenizer_config.json", json.dumps(_tokenizer_config(tokenizer), indent=2) + "\n")


def _write_model(model: LanguageModel, directory: Path, token_ids: dict[str, int]) -> None:
    config: dict[str, Any] = {
        "architectures": ["GAMForCausalLM"], "model_type": MODEL_TYPE, "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    config |= token_ids
    if is_int8(model):
        config["quantization_config"] = quantization_config()
    _write_if_new(directory / "config.json", json.dumps(config | model.config.to_dict(), indent=2) + "\n")
    tensors = {name if name.startswith("lm_head.") else PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    with replacing(directory / "model.safetensors") as temporary:
        save_tensors(temporary, tensors, shown=directory / "model.safetensors")


def load_model(directory: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a model from a run directory.

    Args:
        directory: as `save_model` wrote it.
        device: where the model goes.
        dtype: of the weights; None keeps what was saved.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: where a file is missing, truncated, or does not fit the config.
    """
    directory = Path(directory)
    config = load_config(directory)
    quantized = read_json(directory / "config.json").get("quantization_config")
    path, stored = _load_weights(directory)
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path} holds numbers that are not finite in {name}: copy it again or start a new run")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        shared = [name for name in tensors if name.startswith("embed_tokens.")]
        tensors |= {name.replace("embed_tokens.", "lm_head."): tensors[name] for name in shared}
    with torch.device("meta"):
        model = LanguageModel(config)
    if quantized:
        check_method(quantized)
        quantize_int8(model)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        said = str(error).splitlines()[-1].strip()  # may list every weight there is
        raise InputError(f"{path} does not fit config.json beside it: {said if len(said) <= 300 else said[:300] + ' …'}") from error
    if config.tie_word_embeddings and not quantized:
        model.lm_head.weight = model.embed_tokens.weight
    log_backends(config, str(device))
    return model.to(device=device, dtype=dtype).eval()


def load_config(directory: Path) -> ModelConfig:
    """The model's config.json. Raises InputError where there is none, it is broken, or of an architecture that is not the library's own."""
    values = read_json(needed(directory, "config.json"))
    if (kind := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise InputError(
            f"{directory} holds a model of type {kind!r}: load it with transformers, AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        )
    return ModelConfig.from_dict(values)


def load_tokenizer_of(directory: Path | str) -> Tokenizer:
    """The tokenizer that the model was trained with, which cuts, pads and adds nothing. Raises InputError where it is missing or broken."""
    from gam_lm.data.tokenizer import load_tokenizer

    return load_tokenizer(needed(Path(directory), "tokenizer.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError where the file is broken."""
    try:
        with explained(path, "read"):
            value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is broken ({error}): copy it again or start a new run") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: copy it again or start a new run")
    return value


def needed(directory: Path, name: str) -> Path:
    """A file of a run directory. Raises InputError where either is missing."""
    path = directory / name
    with explained(directory, "read"):
        if not directory.is_dir():
            raise InputError(f"run directory {str(directory)!r} does not exist: name a folder that `gam train` wrote")
        if not path.is_file():
            raise InputError(f"run directory {str(directory)!r} has no {name}: name a folder that `gam train` wrote, or copy the missing file")
    return path


def _write_if_new(path: Path, text: str) -> None:
    """Most checkpoints of a run differ in the weights alone."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):  # it is not there, or not whole: write it
        pass
    write_text(path, text)


def _load_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a model in one file or in shards, and the file that an error names."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file() or not index.is_file():
        path = needed(directory, "model.safetensors")
        return path, load_tensors(path)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()):
        raise InputError(f"{index} has no weight_map of file names: copy it again or start a new run")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= load_tensors(needed(directory, shard))
    if missing := sorted(shards.keys() - tensors.keys()):
        raise InputError(f"{index} names {missing[0]}, which is not in {shards[missing[0]]}: copy the files again")
    return index, tensors


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError where it is broken."""
    try:
        with explained(path, "read"):
            return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error}): copy it again or start a new run") from error


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], **_special_tokens(tokenizer),
    }  # fmt: skip


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Role → token. The end of text also pads where there is nothing else: the mask tells which is which."""
    from gam_lm.data.tokenizer import END_OF_TEXT

    names = {
        END_OF_TEXT: ("eos_token", "bos_token", "pad_token"),
        "[UNK]": ("unk_token",),
        "[PAD]": ("pad_token",),
        "[SOS]": ("bos_token",),
        "[EOS]": ("eos_token",),
    }
    return {role: token for token, roles in names.items() if tokenizer.token_to_id(token) is not None for role in roles}
