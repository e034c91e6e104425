"""How much of its context a model really uses.

The same targets are predicted again and again, each time from the last d tokens before them and nothing else. What the loss gains as d grows is what the model
draws from further back. The text before the d tokens is cut away, not replaced: another text in its place would add the harm of a false context.

Shapes: N targets, T = context tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gam_lm.errors import InputError
from gam_lm.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ContextUse:
    """The loss of the same targets by the number of true tokens before them."""

    context: int
    """The most tokens before a target."""
    targets: int
    """Number of targets."""
    nats: dict[int, float | None]
    """By d: mean loss from the last d tokens; None where the model's positions do not allow it."""
    gains: dict[int, float | None]
    """By d: how much lower the loss is from ``context`` tokens than from d."""
    half_widths: dict[int, float | None]
    """Half the 95 % interval of each gain, over the targets."""


@torch.no_grad()
def context_use(
    model: LanguageModel,
    ids: np.ndarray[Any, Any],
    separator: int | None,
    distances: Sequence[int],
    *,
    context: int = 256,
    targets: int = 2048,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> ContextUse:
    """Measure on a split.

    Args:
        model: its training mode is restored afterwards.
        ids: tokens of the split.
        separator: the id between documents; None where there is none.
        distances: values of d; those above ``context`` make the context longer, where the model's positions allow it.
        context: tokens before each target at least.
        targets: how many, spread evenly over the split.
        batch_size: of no influence on the result.
        advance: called with the number of sequences after each batch.

    Raises:
        InputError: for d < 1, fewer than two targets, or a split without enough places that have the context within their document.
    """
    if min(distances, default=1) < 1:
        raise InputError(f"context_use holds {min(distances)}: use numbers of tokens from 1 up")
    if targets < 2:
        raise InputError(f"targets is {targets}: use at least 2, the interval is over the targets")
    limit = model.config.longest or math.inf
    wanted = sorted({*distances})
    allowed = [d for d in wanted if d <= limit]
    context = max(min(context, int(min(limit, 2**62))), *allowed) if allowed else context
    context_NT, target_N = _contexts(ids, separator, context, targets)
    was_training = model.training
    model.eval()
    losses = {d: _losses(model, context_NT[:, context - d :], target_N, batch_size, advance) for d in sorted({*allowed, context})}
    model.train(was_training)
    nats: dict[int, float | None] = dict.fromkeys(wanted)
    gains, half_widths = dict(nats), dict(nats)
    for d, loss_N in losses.items():
        difference_N = loss_N - losses[context]
        nats[d], gains[d] = float(loss_N.mean()), float(difference_N.mean())
        half_widths[d] = float(1.96 * difference_N.std(ddof=1) / math.sqrt(len(difference_N)))
    return ContextUse(context=context, targets=len(target_N), nats=nats, gains=gains, half_widths=half_widths)


def _contexts(
    ids: np.ndarray[Any, Any], separator: int | None, context: int, targets: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Contexts (N, T) and targets (N,), each target deep enough in a document."""
    whole = np.asarray(ids).astype(np.int64)
    document = np.zeros(len(whole), np.int64) if separator is None else np.cumsum(whole == separator)
    places = np.arange(context, len(whole))
    places = places[document[places - context] == document[places]]  # the context lies within the target's document
    if len(places) < targets:
        raise InputError(
            f"the split has {len(places):,} places with {context} tokens of the same document before them, {targets:,} are needed: use a longer text"
        )
    chosen = places[np.linspace(0, len(places) - 1, targets).round().astype(np.int64)]
    return whole[chosen[:, None] + np.arange(-context, 0)], whole[chosen]


def _losses(
    model: LanguageModel, tokens_NT: np.ndarray[Any, Any], target_N: np.ndarray[Any, Any], batch_size: int, advance: Callable[[int], None] | None
) -> np.ndarray[Any, Any]:
    """Loss of each target, in float64."""
    device = model.embed_tokens.weight.device
    losses = []
    for start in range(0, len(tokens_NT), batch_size):
        part = slice(start, start + batch_size)
        hidden_BTD, _ = model.hidden(torch.from_numpy(tokens_NT[part]).to(device))
        logits_BV = model.lm_head(hidden_BTD[:, -1]).float()
        losses.append(F.cross_entropy(logits_BV, torch.from_numpy(target_N[part]).to(device), reduction="none").double().cpu().numpy())
        if advance is not None:
            advance(len(tokens_NT[part]))
    return np.concatenate(losses)
