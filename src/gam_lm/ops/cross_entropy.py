"""The cross-entropy of a language model without its logits: a vocabulary of 10,000 makes them most of a training step's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_lm.ops.first_derivative import refuse_second_derivative

IGNORE = -100
"""A target that is not predicted."""

CHUNK_TOKENS = 1024
"""Rows of logits held at once, in the products' format: each chunk passes once over the gradient of the head."""

CACHED = 2**18
"""Numbers that the softmax works on at once on a CPU: 1 MiB of fp32, which stays in a core's cache through its eight passes."""


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """mean over the counted targets of −log softmax(h Wᵀ)[target], never holding more than 1,024 rows of logits.

    Equal to ``F.cross_entropy(h @ W.T, target)``; both gradients are found in the forward pass, chunk by chunk, so that
    nothing is computed twice. (torch.nn.functional.linear_cross_entropy, from PyTorch 2.13, does the same under its own options;
    this serves every version with one behaviour.)

    Args:
        h_ND: one hidden vector per token.
        weight_VD: the output head.
        target_N: ids; −100 is not counted. With no counted target the loss is 0.
    """
    return _LinearCrossEntropy.apply(h_ND, weight_VD, target_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        device = h_ND.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        dtype = torch.promote_types(product_dtype, torch.float32)
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(product_dtype)
        keep_N = target_N != IGNORE
        index_N = target_N.where(keep_N, 0)
        share_N = keep_N.to(dtype) / keep_N.sum().clamp(min=1)
        loss = torch.zeros((), dtype=dtype, device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if wants_h else None
        grad_weight: Tensor | None = None
        # Two buffers serve all chunks: fresh ones of this size would cost more in page faults than the arithmetic.
        rows = min(CHUNK_TOKENS, len(h_ND))
        piece = max(1, CACHED // len(weight)) if device == "cpu" else rows
        products = torch.empty(rows, len(weight), dtype=product_dtype, device=h_ND.device)
        values = torch.empty(min(piece, rows), len(weight), dtype=dtype, device=h_ND.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h_ND), CHUNK_TOKENS):
                chunk = slice(start, start + CHUNK_TOKENS)
                h, index, share = h_ND[chunk].to(product_dtype), index_N[chunk, None], share_N[chunk, None]
                low = products[: len(h)]
                torch.mm(h, weight.T, out=low)
                for low_part, index_part, share_part in zip(low.split(piece), index.split(piece), share.split(piece), strict=True):
                    logits = values[: len(low_part)].copy_(low_part)
                    logits.sub_(logits.amax(1, keepdim=True))
                    picked = logits.gather(1, index_part)
                    total = logits.exp_().sum(1, keepdim=True)
                    loss += ((total.log() - picked) * share_part).sum()
                    if wants_h or wants_weight:  # (softmax − one-hot) / count
                        low_part.copy_(logits.mul_(share_part / total).scatter_add_(1, index_part, -share_part))
                if grad_h is not None:
                    grad_h[chunk] = low @ weight
                if wants_weight:
                    grad_weight = (low.T @ h).to(dtype) if grad_weight is None else grad_weight.add_(low.T @ h)
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VD, dtype=dtype)
        ctx.save_for_backward(*(g for g in (grad_h, grad_weight) if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative("the loss without logits", "ask the model for return_logits=True")
        saved = list(ctx.saved_tensors)
        grads = [saved.pop(0) * grad_outputs[0] if wanted else None for wanted in ctx.needs_input_grad[:2]]
        return grads[0], grads[1], None


@torch.no_grad()
def token_losses(h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """−log softmax(h Wᵀ)[target] of every token, in fp32 or wider (N,), 0 where the target is −100; for measuring, without gradients."""
    device = h_ND.device.type
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    dtype = torch.promote_types(product_dtype, torch.float32)
    weight = weight_VD.to(product_dtype)
    losses_N = torch.empty(len(h_ND), dtype=dtype, device=h_ND.device)
    rows = min(CHUNK_TOKENS, len(h_ND))
    piece = max(1, CACHED // len(weight)) if device == "cpu" else rows
    products = torch.empty(rows, len(weight), dtype=product_dtype, device=h_ND.device)
    values = torch.empty(min(piece, rows), len(weight), dtype=dtype, device=h_ND.device)
    for start in range(0, len(h_ND), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        h = h_ND[chunk].to(product_dtype)
        low = products[: len(h)]
        torch.mm(h, weight.T, out=low)
        for low_part, target, losses in zip(low.split(piece), target_N[chunk].split(piece), losses_N[chunk].split(piece), strict=True):
            logits = values[: len(low_part)].copy_(low_part)
            losses.copy_(F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none"))
    return losses_N


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The same mean from logits that are at hand anyway, in fp32 or wider."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    total = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORE, reduction="sum")
    return total / (target_N != IGNORE).sum().clamp(min=1)


def naive_cross_entropy(h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The mean of log Σ_v exp(h · W_v) − h · W_target over the counted targets, one at a time, for tests."""
    losses = [(weight_VD @ h_D).exp().sum().log() - weight_VD[target] @ h_D for h_D, target in zip(h_ND, target_N, strict=True) if target != IGNORE]
    return torch.stack(losses).mean() if losses else h_ND.new_zeros(())
