"""One optimiser step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.training.divergence import diverged
from gam_lm.training.optimizers import set_rate
from gam_lm.training.precision import autocast
from gam_lm.training.recipe import TrainConfig


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, batch: tuple[Any, Any], recipe: TrainConfig, rate: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """One optimiser step over a batch, in ``recipe.accumulate`` parts that each weigh by their counted targets.

    Returns:
        The mean loss in nats per token and the norm of the gradient before clipping, both on the model's device, and the counted targets.

    Raises:
        DivergedError: where loss or gradient are not finite; the weights are then as they were before.
    """
    device = model.embed_tokens.weight.device
    tokens, targets = (torch.from_numpy(part) for part in batch)
    counted = int((targets != IGNORE).sum())
    total = torch.zeros((), device=device)
    for tokens_BT, targets_BT in zip(tokens.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True):
        share = int((targets_BT != IGNORE).sum()) / counted
        with autocast(device, dtype):
            _, loss = model(tokens_BT.to(device, non_blocking=True), targets_BT.to(device, non_blocking=True), return_logits=False)
        (loss * share).backward()
        total += loss.detach() * share
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not bool(torch.isfinite(total + norm)):
        error = diverged(model, tokens.to(device), targets.to(device), dtype, total, rate)
        optimizer.zero_grad(set_to_none=True)
        raise error
    if recipe.clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.clip, norm)
    set_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm, counted
