"""The models of a comparison, built to the same number of parameters: the library's own, and any of transformers as ``hf:<model_type>``."""

from __future__ import annotations

import logging
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from gam_lm.config import ModelConfig
from gam_lm.errors import MissingExtraError
from gam_lm.mixers.registry import mixer_class
from gam_lm.model import Block, LanguageModel, count_parameters
from gam_lm.presets import model_name, named_model
from gam_lm.training.loop import new_model

logger = logging.getLogger("gam_lm")

BASELINE = "hf:"
"""What the names of models of transformers, and the ``mixer`` of their descriptions, begin with."""

CLOSE_ENOUGH = 0.01
"""A model within this share of the target is left as its name says."""


def contender(name: str, base: ModelConfig, *, match: bool) -> tuple[str, ModelConfig]:
    """The row name and configuration of a model in a comparison.

    Args:
        name: of gam_lm.presets.MODELS, or gam, or hf:<model_type>.
        base: what the models share.
        match: size the model to the parameters of the static GAM at ``base``; the paper's own sizes are not matched.

    Raises:
        InputError: for an unknown name, or an baseline that finds no size near enough.
    """
    target = count_parameters(named_model("gam-static", base)) if match else None
    if name.startswith(BASELINE):
        return name, _baseline(name, base, target)
    name = model_name(name)
    config = named_model(name, base)
    return name, config if target is None else match_parameters(config, target)


def block_contender(name: str, base: ModelConfig) -> tuple[str, ModelConfig]:
    """The same for a comparison of single blocks of one width: an baseline's feed-forward network makes its blocks as large as those of the static GAM."""
    if not name.startswith(BASELINE):
        return model_name(name), named_model(name, base)
    baselines = _baselines(name)
    baseline = baselines.describe(name, base)
    if baseline.intermediate_size is None:
        return name, baseline
    one_block = baseline.replace(num_hidden_layers=baselines.period(baseline), max_position_embeddings=1)
    target = count_parameters(named_model("gam-static", base.replace(num_hidden_layers=one_block.num_hidden_layers)))
    return name, baseline.replace(intermediate_size=baselines.match(one_block, target, only_inner=True).intermediate_size)


def build(config: ModelConfig, seed: int, device: torch.device) -> LanguageModel:
    """A model whose start values are a function of ``seed`` alone."""
    if not config.mixer.startswith(BASELINE):
        return new_model(config, seed, device)
    torch.manual_seed(seed)
    model: LanguageModel = _baselines(config.mixer).Baseline(config)
    return model.to(device)


def build_block(config: ModelConfig, length: int) -> tuple[Block, int]:
    """What a comparison of blocks runs over ``length`` tokens, with its start values, and how many blocks it is: more than one for a hybrid of transformers."""
    if not config.mixer.startswith(BASELINE):
        return LanguageModel(config.replace(num_hidden_layers=1, vocab_size=1, max_position_embeddings=1)).layers[0], 1
    baselines = _baselines(config.mixer)
    blocks = baselines.period(config)
    return baselines.BaselineBlock(
        config.replace(num_hidden_layers=blocks, max_position_embeddings=max(length, config.max_position_embeddings))
    ), blocks


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block; where several kinds take turns, the mean."""
    turn = _baselines(config.mixer).period(config) if config.mixer.startswith(BASELINE) else 1
    once, twice = (parameters(config.replace(num_hidden_layers=n * turn)) for n in (1, 2))
    return (twice - once) // turn


def parameters(config: ModelConfig) -> int:
    """How many the model has, without allocating it."""
    if not config.mixer.startswith(BASELINE):
        return count_parameters(config)
    count: int = _baselines(config.mixer).count(config)
    return count


def state_bytes(config: ModelConfig, context: int) -> int:
    """What one sequence carries from token to token after ``context`` tokens, in fp32."""
    if not config.mixer.startswith(BASELINE):
        return config.num_hidden_layers * mixer_class(config.mixer).cost(config, context).state_bytes
    measured: int = _baselines(config.mixer).state_bytes(config, context)
    return measured


def described(config: ModelConfig) -> dict[str, Any]:
    """What a row says of its model: ``backend`` and ``model_config``, and of an baseline how transformers describes it."""
    if not config.mixer.startswith(BASELINE):
        return {"backend": mixer_class(config.mixer).backend_name(config), "model_config": config.to_dict()}
    baselines = _baselines(config.mixer)
    return {"backend": baselines.backend_name(config), "model_config": config.to_dict(), **baselines.columns(config)}


def _baseline(name: str, base: ModelConfig, target: int | None) -> ModelConfig:
    baselines = _baselines(name)
    config: ModelConfig = baselines.describe(name, base)
    if target is not None:
        config = baselines.match(config, target)
    logger.info(
        "%s: %s parameters%s: hidden_size %d, num_hidden_layers %d%s; backend %s", name, f"{baselines.count(config):,}",
        f" for {target:,} wanted" if target else "", config.hidden_size, config.num_hidden_layers,
        f", intermediate_size {config.intermediate_size}" if config.intermediate_size else f", state_size {config.state_size}",
        baselines.backend_name(config),
    )  # fmt: skip
    return config


def _baselines(name: str) -> ModuleType:
    """The room that knows transformers, entered only where a name asks for it."""
    try:
        return import_module("gam_lm.hf.baselines")
    except MissingExtraError as error:
        raise MissingExtraError("transformers", "hf", f"model {name}") from error


def match_parameters(config: ModelConfig, target: int) -> ModelConfig:
    """``config`` with as nearly ``target`` parameters as its feed-forward width, or without one its depth and expansion, allow."""
    if abs(count_parameters(config) - target) <= CLOSE_ENOUGH * target:
        return config
    if config.ffn_size:
        return _match_feed_forward(config, target)
    return _match_depth(config, target)


def _match_feed_forward(config: ModelConfig, target: int) -> ModelConfig:
    """The count is linear in the width; the width stays a multiple of 8, which every matrix unit likes."""
    size = config.ffn_size
    slope = count_parameters(config.replace(intermediate_size=size + 1)) - count_parameters(config)
    wanted = size + (target - count_parameters(config)) / slope
    return config.replace(intermediate_size=max(8, 8 * round(wanted / 8)))


def _match_depth(config: ModelConfig, target: int) -> ModelConfig:
    """The depth that comes nearest, then the expansion in whole channels, multiples of 8."""
    one, two = (count_parameters(config.replace(num_hidden_layers=n)) for n in (1, 2))
    depth = max(1, round(1 + (target - one) / (two - one)))
    config = config.replace(num_hidden_layers=depth)
    channels = round(config.expand * config.hidden_size)
    wider = config.replace(expand=(channels + 8) / config.hidden_size)
    slope = (count_parameters(wider) - count_parameters(config)) / 8
    wanted = channels + (target - count_parameters(config)) / slope
    return config.replace(expand=max(8, 8 * round(wanted / 8)) / config.hidden_size)
