"""The run directory, which is a Hugging Face model directory.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json      the model, for whoever loads it
    recipe.json  metrics.jsonl  results.json                                   how it was trained
    state/step-N/                                                              what a killed run goes on from

No pickle is ever written or loaded.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gam_lm.config import MODEL_TYPE, ModelConfig
from gam_lm.errors import InputError
from gam_lm.inference.int8 import check_method, is_int8, quantization_config, quantize_int8
from gam_lm.model import LanguageModel
from gam_lm.runtime.files import explained, replacing, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("gam_lm")

PREFIX = "model."  # what Hugging Face puts before the names of everything but the head


def save_model(directory: Path, model: LanguageModel, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and, when given, the tokenizer, each whole or not at all.

    The shared weight of embedding and head is written once. A model of somebody else's, which has a ``write_to``, writes its own two files.
    """
    token_ids: dict[str, int] = {}
    if tokenizer is not None:
        ids = {role: tokenizer.token_to_id(token) for role, token in _special_tokens(tokenizer).items()}
        token_ids = {f"{role}_id": number for role in ("bos_token", "eos_token", "pad_token") if (number := ids.get(role)) is not None}
    write: Callable[[Path, dict[str, int]], None] = getattr(model, "write_to", partial(_write_model, model))
    write(directory, token_ids)
    if tokenizer is not None:
        write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=False))
        write_text(directory / "tokenizer_config.json", json.dumps(_tokenizer_config(tokenizer), indent=2) + "\n")


def _write_model(model: LanguageModel, directory: Path, token_ids: dict[str, int]) -> None:
    config: dict[str, Any] = {
        "architectures": ["GAMForCausalLM"], "model_type": MODEL_TYPE, "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    config |= token_ids
    if is_int8(model):
        config["quantization_config"] = quantization_config()
    write_text(directory / "config.json", json.dumps(config | model.config.to_dict(), indent=2) + "\n")
    tensors = {name if name.startswith("lm_head.") else PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    _save_tensors(directory / "model.safetensors", tensors)


def load_model(directory: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a model from a run directory.

    Args:
        directory: as :func:`save_model` wrote it.
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
    path = _needed(directory, "model.safetensors")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in _load_tensors(path).items()}
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
        raise InputError(f"{path} does not fit config.json beside it: {str(error).splitlines()[-1].strip()}") from error
    if config.tie_word_embeddings and not quantized:
        model.lm_head.weight = model.embed_tokens.weight
    return model.to(device=device, dtype=dtype).eval()


def load_config(directory: Path) -> ModelConfig:
    """The model's config.json. Raises InputError where there is none, it is broken, or of an architecture that is not the library's own."""
    values = read_json(_needed(directory, "config.json"))
    if (kind := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise InputError(
            f"{directory} holds a model of type {kind!r}: load it with transformers, AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        )
    return ModelConfig.from_dict(values)


def load_tokenizer_of(directory: Path | str) -> Tokenizer:
    """The tokenizer that the model was trained with. Raises InputError where it is missing or broken."""
    from tokenizers import Tokenizer

    path = _needed(Path(directory), "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise InputError(f"{path} is no tokenizer ({error}): copy it again from where the model was trained") from error


def save_state(
    directory: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what the run needs to go on after ``step`` as if it had never stopped; older states are removed afterwards.

    ``average`` holds the averaged weights by name, where the run keeps such.
    """
    path = directory / "state" / f"step-{step:08d}"
    with replacing(path) as temporary:
        temporary.mkdir()
        _save_tensors(
            temporary / "model.safetensors",
            {name: tensor for name, tensor in model.state_dict().items() if name not in _shared(model)},
        )
        moments = {f"{i}.{name}": value for i, values in optimizer.state_dict()["state"].items() for name, value in values.items()}
        _save_tensors(temporary / "optimizer.safetensors", moments)
        if average is not None:
            _save_tensors(temporary / "average.safetensors", dict(average))
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        _save_tensors(temporary / "generators.safetensors", generators)
        (temporary / "progress.json").write_text(json.dumps(progress | {"step": step}), encoding="utf-8")
    for other in (directory / "state").glob("step-*"):
        if other != path:
            shutil.rmtree(other)


def load_state(
    directory: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
) -> dict[str, Any] | None:
    """Put model, optimiser, generators and, in place, the ``average`` back to the latest state and return its progress; None where there is none."""
    found = sorted((directory / "state").glob("step-*"))
    if not found:
        return None
    path = found[-1]
    progress = read_json(_needed(path, "progress.json"))
    tensors = _load_tensors(_needed(path, "model.safetensors"))
    model.load_state_dict(tensors | {name: tensors[first] for name, first in _shared(model).items()})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _load_tensors(_needed(path, "optimizer.safetensors")).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is not None:
        saved = _load_tensors(_needed(path, "average.safetensors"))
        for name, tensor in average.items():
            tensor.copy_(saved[name])
    generators = _load_tensors(_needed(path, "generators.safetensors"))
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    logger.info("resuming %s after step %d", directory, progress["step"])
    return progress


def _shared(model: LanguageModel) -> dict[str, str]:
    """Name → earlier name of the same parameter, as of a head that shares the embedding."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(tensor), name)) for name, tensor in model.state_dict(keep_vars=True).items()]
    return {name: earlier for name, earlier in names if name != earlier}


def remove_state(directory: Path) -> None:
    """Drop what a finished run no longer needs."""
    shutil.rmtree(directory / "state", ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError where the file is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is broken ({error}): copy it again or start a new run") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: copy it again or start a new run")
    return value


def _needed(directory: Path, name: str) -> Path:
    path = directory / name
    if not directory.is_dir():
        raise InputError(f"run directory {str(directory)!r} does not exist: name a folder that `gam train` wrote")
    if not path.is_file():
        raise InputError(f"run directory {str(directory)!r} has no {name}: name a folder that `gam train` wrote, or copy the missing file")
    return path


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary, explained(path):
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}; choose another place or make room") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error}): copy it again or start a new run") from error


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], **_special_tokens(tokenizer),
    }  # fmt: skip


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Role → token. The end of text also pads where there is nothing else: the mask tells which is which."""
    names = {
        "<|endoftext|>": ("eos_token", "bos_token", "pad_token"),
        "[UNK]": ("unk_token",),
        "[PAD]": ("pad_token",),
        "[SOS]": ("bos_token",),
        "[EOS]": ("eos_token",),
    }
    return {role: token for token, roles in names.items() if tokenizer.token_to_id(token) is not None for role in roles}
