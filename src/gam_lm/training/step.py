"""One optimiser step."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_lm.data.blocks import Batch
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.training.distributed import DataParallel, World
from gam_lm.training.divergence import diverged
from gam_lm.training.optimizers import set_rate
from gam_lm.training.precision import autocast
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.sharding import total_norm


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: TrainConfig,
    rate: float,
    dtype: torch.dtype,
    parallel: DataParallel | None = None,
) -> tuple[Tensor, Tensor, int]:
    """One optimiser step over a batch, in ``recipe.accumulate`` parts that each weigh by their counted targets.

    ``parallel`` holds ``model`` on several processes, each of which takes its rows of the same batch; all make the same step.

    Returns:
        The mean loss in nats per token and the norm of the gradient before clipping, both of the whole batch and on the model's device, and the counted
        targets.

    Raises:
        DivergedError: where loss or gradient are not finite; the weights are then as they were before.
    """
    parallel = parallel or DataParallel(model, World())
    weight = model.embed_tokens.weight
    device = weight.device
    tokens, targets, *segments = (torch.from_numpy(part) for part in batch)
    counted = int((targets != IGNORE).sum())
    total = torch.zeros((), device=device, dtype=torch.promote_types(weight.dtype, torch.float32))
    parts = list(zip(*(parallel.parts(each, recipe.accumulate) for each in (tokens, targets, *segments)), strict=True))
    for number, (tokens_BT, targets_BT, *several) in enumerate(parts, 1):
        share = int((targets_BT != IGNORE).sum()) / counted
        segments_BT = several[0].to(device, non_blocking=True) if several else None
        with parallel.summed(last=number == len(parts)):
            with autocast(device, dtype):
                _, loss = parallel.module(
                    tokens_BT.to(device, non_blocking=True), targets_BT.to(device, non_blocking=True), segments=segments_BT, return_logits=False
                )
            (loss * (share * parallel.scale)).backward()
        total += loss.detach() * share
    parallel.world.sum(total)
    norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
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
