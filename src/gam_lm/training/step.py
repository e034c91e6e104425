"""One optimiser step."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_lm.data.blocks import Batch
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.training.divergence import diverged
from gam_lm.training.optimizers import set_rate
from gam_lm.training.precision import autocast
from gam_lm.training.recipe import TrainConfig


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, recipe: TrainConfig, rate: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """One optimiser step over a batch, in ``recipe.accumulate`` parts that each weigh by their counted targets.

    Returns:
        The mean loss in nats per token and the norm of the gradient before clipping, both on the model's device, and the counted targets.

    Raises:
        DivergedError: where loss or gradient are not finite; the weights are then as they were before.
    """
    device = model.embed_tokens.weight.device
    tokens, targets, *segments = (torch.from_numpy(part) for part in batch)
    counted = int((targets != IGNORE).sum())
    total = torch.zeros((), device=device)
    parts = (part.chunk(recipe.accumulate) for part in (tokens, targets, *segments))
    for tokens_BT, targets_BT, *several in zip(*parts, strict=True):
        share = int((targets_BT != IGNORE).sum()) / counted
        if share == 0:  # a mean over no target is not a number
            continue
        segments_BT = several[0].to(device, non_blocking=True) if several else None
        with autocast(device, dtype):
            _, loss = model(
                tokens_BT.to(device, non_blocking=True), targets_BT.to(device, non_blocking=True), segments=segments_BT, return_logits=False
            )
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
