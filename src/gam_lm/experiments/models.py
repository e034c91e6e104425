"""The models of a comparison, built to the same number of parameters: the library's own, and any of transformers as ``hf:<model_type>``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import POSITION_BYTES, model_cost
from gam_lm.errors import MissingExtraError
from gam_lm.mixers.registry import mixer_class
from gam_lm.model import LanguageModel, count_parameters
from gam_lm.presets.models import BASELINE, SIZED_BY, Fields, changed, named_model
from gam_lm.training.loop import new_model

logger = logging.getLogger("gam_lm")

CLOSE_ENOUGH = 0.01
"""A model within this share of the target is left as its name says."""


def contender(name: str, base: Fields, *, match: bool) -> tuple[str, ModelConfig]:
    """The row name and configuration of a model in a comparison.

    Args:
        name: as of gam_lm.presets.models.named_model, or hf:<model_type>.
        base: what the models share.
        match: size the model to the parameters of the static GAM at ``base``; the paper's own sizes are not matched.

    Raises:
        InputError: for an unknown name, or a baseline that finds no size near enough.
    """
    target = count_parameters(named_model(SIZED_BY, base)) if match else None
    if name.startswith(BASELINE):
        return name, _baseline(name, base, target)
    config = named_model(name, base)
    return name, config if target is None else match_parameters(config, target)


def block_contender(name: str, base: Fields) -> tuple[str, ModelConfig]:
    """The same for a comparison of single blocks of one width: a baseline's feed-forward network makes its blocks as large as those of the static GAM."""
    if not name.startswith(BASELINE):
        return name, named_model(name, base)
    baselines = _baselines(name)
    baseline = baselines.describe(name, base)
    if baseline.intermediate_size is None:
        return name, baseline
    one_block = baseline.replace(num_hidden_layers=baselines.period(baseline), max_position_embeddings=1)
    target = count_parameters(named_model(SIZED_BY, {**base, "num_hidden_layers": one_block.num_hidden_layers}))
    return name, baseline.replace(intermediate_size=baselines.match(one_block, target, only_inner=True).intermediate_size)


def is_baseline(config: ModelConfig) -> bool:
    """Whether ``config`` describes a model of transformers."""
    return config.mixers[0].startswith(BASELINE)


def build(config: ModelConfig, seed: int, device: torch.device) -> LanguageModel:
    """A model whose initial values are a function of ``seed`` alone."""
    if not is_baseline(config):
        return new_model(config, seed, device)
    torch.manual_seed(seed)
    model: LanguageModel = _baselines(config.mixers[0]).Baseline(config)
    return model.to(device)


def build_blocks(config: ModelConfig, length: int) -> tuple[nn.Module, int]:
    """What a comparison of blocks runs over ``length`` tokens, with its initial values, and how many blocks it is: more than one where kinds take turns."""
    blocks = turn(config)
    if is_baseline(config):
        longest = max(length, config.max_position_embeddings)
        return _baselines(config.mixers[0]).BaselineBlock(config.replace(num_hidden_layers=blocks, max_position_embeddings=longest)), blocks
    model = LanguageModel(config.replace(num_hidden_layers=blocks, vocab_size=1, max_position_embeddings=1))
    return (model.layers[0] if blocks == 1 else Turn(model.layers)), blocks


class Turn(nn.Module):
    """Blocks of several kinds, one after the other, called as one block is."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_BTD: Tensor, state: None = None, segments_BT: None = None) -> tuple[Tensor, None]:
        """All of them, from no state."""
        for layer in self.layers:
            x_BTD, _ = layer(x_BTD, state, segments_BT)
        return x_BTD, None


def turn(config: ModelConfig) -> int:
    """Layers after which the kinds of layers repeat."""
    if is_baseline(config):
        period: int = _baselines(config.mixers[0]).period(config)
        return period
    return len(config.mixers) if len(set(config.mixers)) > 1 else 1


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block; where several kinds take turns, the mean."""
    once, twice = (parameters(config.replace(num_hidden_layers=n * turn(config))) for n in (1, 2))
    return (twice - once) // turn(config)


def parameters(config: ModelConfig) -> int:
    """How many the model has, without allocating it."""
    if not is_baseline(config):
        return count_parameters(config)
    count: int = _baselines(config.mixers[0]).count(config)
    return count


def state_bytes(config: ModelConfig, context: int) -> int:
    """What one sequence carries from token to token after ``context`` tokens, in fp32."""
    if not is_baseline(config):
        return model_cost(config, context).state_bytes - POSITION_BYTES
    measured: int = _baselines(config.mixers[0]).state_bytes(config, context)
    return measured


def activations_per_token(config: ModelConfig, context: int) -> float:
    """Numbers that the largest layer keeps per token, about; of a model of transformers its width."""
    if is_baseline(config):
        return 16.0 * config.hidden_size
    return max(mixer_class(name).cost(config, context).activations for name in config.mixers)


def described(config: ModelConfig, device: torch.device | None = None) -> dict[str, Any]:
    """What a row says of its model: ``backend`` and ``model_config``, and of a baseline how transformers describes it; the device as of `backend_name`."""
    if not is_baseline(config):
        return {"backend": backend_name(config, device), "model_config": config.to_dict()}
    baselines = _baselines(config.mixers[0])
    return {"backend": baselines.backend_name(config), "model_config": config.to_dict(), **baselines.columns(config)}


def backend_name(config: ModelConfig, device: torch.device | None = None) -> str:
    """Which implementations of its mixers run on ``device`` (None: a GPU if there is one), as results name them."""
    where = None if device is None else str(device)
    return "-".join(dict.fromkeys(mixer_class(name).backend_name(config, where) for name in config.mixers))


def _baseline(name: str, base: Fields, target: int | None) -> ModelConfig:
    baselines = _baselines(name)
    config: ModelConfig = baselines.describe(name, base)
    if target is not None:
        config = baselines.match(config, target)
    logger.info(
        "%s: %s parameters%s: hidden_size %d, num_hidden_layers %d%s; backend %s", name, f"{baselines.count(config):,}",
        f" for {target:,} wanted" if target else "", config.hidden_size, config.num_hidden_layers,
        f", intermediate_size {config.intermediate_size}" if config.intermediate_size else "",
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
    sizes = [config.feed_forward_size(each) for each in config.options]
    return _match_feed_forward(config, max(sizes), target) if all(sizes) else _match_depth(config, target)


def _match_feed_forward(config: ModelConfig, size: int, target: int) -> ModelConfig:
    """The count is linear in the width; the width stays a multiple of 8, which every matrix unit likes."""
    here = count_parameters(config.replace(intermediate_size=size))
    slope = count_parameters(config.replace(intermediate_size=size + 1)) - here
    wanted = size + (target - here) / slope
    return config.replace(intermediate_size=max(8, 8 * round(wanted / 8)))


def _match_depth(config: ModelConfig, target: int) -> ModelConfig:
    """The depth that comes nearest, then the expansion of the mixer in whole channels, multiples of 8, where it has one."""
    blocks = turn(config)
    one, two = (count_parameters(config.replace(num_hidden_layers=n * blocks)) for n in (1, 2))
    config = config.replace(num_hidden_layers=blocks * max(1, round(1 + (target - one) / (two - one))))
    field = config.options[0].expansion
    if field is None:
        return config
    width = config.hidden_size
    channels = round(getattr(config.options[0], field) * width)
    slope = (count_parameters(changed(config, {field: (channels + 8) / width})) - count_parameters(config)) / 8
    wanted = channels + (target - count_parameters(config)) / slope
    return changed(config, {field: max(8, 8 * round(wanted / 8)) / width})
