"""The models of a comparison, built to the same number of parameters."""

from __future__ import annotations

from gam_lm.config import ModelConfig
from gam_lm.model import count_parameters
from gam_lm.presets import model_name, named_model

CLOSE_ENOUGH = 0.01
"""A model within this share of the target is left as its name says."""


def contender(name: str, base: ModelConfig, *, match: bool) -> tuple[str, ModelConfig]:
    """The row name and configuration of a model in a comparison.

    Args:
        name: of gam_lm.presets.MODELS, or gam.
        base: what the models share.
        match: size the model to the parameters of the static GAM at ``base``; the paper's own sizes are not matched.

    Raises:
        InputError: for an unknown name.
    """
    name = model_name(name)
    config = named_model(name, base)
    if match:
        config = match_parameters(config, count_parameters(named_model("gam-static", base)))
    return name, config


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
