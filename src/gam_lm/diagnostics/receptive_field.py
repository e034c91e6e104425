"""How far back a model can see: what its mixers say of themselves, and what a changed token changes.

Shapes: T tokens, V = vocab_size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gam_lm.config import ModelConfig
from gam_lm.mixers.registry import mixer_class
from gam_lm.model import LanguageModel

PROBES = 4
"""Random texts of which the largest effect counts."""

ROWS = 16
"""Texts at once, always: a product of another shape rounds otherwise, which would look like an effect."""


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """What a model's last prediction depends on."""

    analytic: int | None
    """Tokens that a prediction can depend on, the current one included, by the mixers' ``reach``; None is without limit."""
    measured: int
    """The farthest token whose change changed the prediction, counted in the same way."""
    length: int
    """Tokens of the texts that were tried."""
    effects: dict[int, float]
    """By distance (0 is the current token): the Kullback-Leibler divergence in nats between the predictions with and without the change."""


def analytic_reach(config: ModelConfig) -> int | None:
    """1 + Σ (reach − 1) over the layers: a layer hands on what the layer below saw. None is without limit."""
    reaches = [mixer_class(name).reach(config) for name in config.layer_mixers]
    return None if None in reaches else 1 + sum((reach or 1) - 1 for reach in reaches)


@torch.no_grad()
def receptive_field(model: LanguageModel, *, length: int | None = None, distances: Sequence[int] | None = None, seed: int = 0) -> ReceptiveField:
    """Change one token at a time and see whether the last prediction changes, in fp64, in which rounding hides no effect.

    Args:
        model: trained or not; a copy is measured.
        length: T; by default 256, or as many as learned positions allow.
        distances: how far back the changed tokens lie; by default every one up to 32, then in steps that grow.
        seed: of the random texts.

    Raises:
        InputError: for a length beyond the model's positions.
    """
    config = model.config
    length = length or min(256, config.longest or 256)
    config.check_length("length", length)
    if distances is None:
        distances = [d for d in (*range(32), *(round(32 * 2 ** (i / 4)) for i in range(60)), length - 1) if d < length]
    distances = sorted({*distances} & {*range(length)})
    exact = copy.deepcopy(model).double().eval()
    device = exact.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    effects = dict.fromkeys(distances, 0.0)
    for _ in range(PROBES):
        text_T = torch.randint(config.vocab_size, (length,), generator=generator)
        others = torch.randint(1, config.vocab_size, (len(distances),), generator=generator)
        changed = text_T.repeat(len(distances), 1)
        for row, (distance, other) in enumerate(zip(distances, others, strict=True)):
            at = length - 1 - distance
            changed[row, at] = (text_T[at] + other) % config.vocab_size
        before_RV = _last_prediction(exact, text_T.repeat(ROWS, 1).to(device))
        for some, part in zip(torch.arange(len(distances)).split(ROWS), changed.split(ROWS), strict=True):
            filled = torch.cat([part, text_T.repeat(ROWS - len(part), 1)])
            after_RV = _last_prediction(exact, filled.to(device))
            for row, after_V, before_V in zip(some.tolist(), after_RV, before_RV, strict=False):  # what fills the batch is left out
                if torch.equal(after_V, before_V):
                    continue
                divergence = float(F.kl_div(after_V, before_V, log_target=True, reduction="sum"))
                effects[distances[row]] = max(effects[distances[row]], divergence, 1e-300)
    seen = [distance for distance, effect in effects.items() if effect > 0]
    return ReceptiveField(analytic=analytic_reach(config), measured=1 + max(seen, default=-1), length=length, effects=effects)


def _last_prediction(model: LanguageModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD, _ = model.hidden(tokens_BT)
    return model.lm_head(hidden_BTD[:, -1]).log_softmax(-1)


def explain(field: ReceptiveField, config: ModelConfig) -> str:
    """The finding in words, and what to change to see more."""
    found = f"changing a token changes the prediction up to {field.measured} tokens back (the current one counts), in texts of {field.length} tokens"
    names = " and ".join(dict.fromkeys(config.mixers))
    if field.analytic is None:
        words = [f"By its construction {names} can use everything before a token; {found}."]
        if config.longest is not None:
            words.append(f"Learned positions end at {config.longest}: positions='none' has no end.")
        return " ".join(words)
    words = [f"By its construction a prediction depends on the last {field.analytic} tokens and nothing older; {found}."]
    return " ".join(words + [advice for name in dict.fromkeys(config.mixers) if (advice := mixer_class(name).advice(config))])
