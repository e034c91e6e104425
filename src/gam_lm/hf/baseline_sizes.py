"""Sizing a baseline: the model type's own fields are changed until it has the parameters that are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.hf.baseline_networks import count
from gam_lm.hf.baseline_options import BaselineOptions
from gam_lm.presets.models import changed

CLOSE_ENOUGH = 0.01
"""A baseline has the wanted number of parameters to within this share."""


def match(config: ModelConfig, target: int, *, only_inner: bool = False) -> ModelConfig:
    """``config`` with ``target`` parameters to within 1 %.

    The width of the feed-forward network is changed, or the states of a state space; where that is not enough the depth too, then the width.
    With ``only_inner`` nothing but the feed-forward network, and its nearest size is taken.

    Raises:
        InputError: where no size comes near enough.
    """
    if only_inner:
        return next(_solved(config, "intermediate_size", 8, target), config)
    for each in _sizes(config, target):
        if abs(count(each) - target) <= CLOSE_ENOUGH * target:
            return each
    raise InputError(f"model {config.mixers[0]!r} finds no size near {target:,} parameters: change the architecture's hidden_size or num_hidden_layers")


def _sizes(config: ModelConfig, target: int) -> Iterator[ModelConfig]:
    """Sizes to try, the least changed first."""
    yield config
    depths = sorted(range(1, 3 * config.num_hidden_layers + 1), key=lambda n: abs(n - config.num_hidden_layers))
    deep = [config.replace(num_hidden_layers=n) for n in depths]
    for step in (8, 1):  # multiples of 8 suit every matrix unit
        yield from (each for one in deep for each in _solved(one, "intermediate_size", step, target))
    spaces = [each for one in deep for each in _solved(one, "state_size", 1, target)]
    states, heads = config.options_of(BaselineOptions).state_size, config.options_of(BaselineOptions).num_heads or 1
    yield from sorted(spaces, key=lambda each: abs(math.log(each.options_of(BaselineOptions).state_size / states)))
    for one in deep:
        for wide in _solved(one, "hidden_size", 8 * heads, target):
            yield wide
            yield from _solved(wide, "intermediate_size", 8, target)


def _solved(config: ModelConfig, field: str, step: int, target: int) -> Iterator[ModelConfig]:
    """``field`` changed so that the count, taken as linear, meets the target; nothing where it would be out of proportion or changes nothing."""
    size, width = config.to_dict().get(field) or getattr(config.options_of(BaselineOptions), field, None), config.hidden_size
    if size is None:
        return
    slope = count(changed(config, {field: size + step})) - count(config)
    solved = size + step * round((target - count(config)) / slope) if slope else 0
    least, most = {"intermediate_size": (width // 2, 16 * width), "state_size": (4, 3 * size), "hidden_size": (step, 8 * size)}[field]
    if least <= solved <= most:
        yield changed(config, {field: solved})
