"""The cross-entropy of a language model without its logits: a vocabulary of 10,000 makes them most of a training step's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that is not predicted."""

CHUNK_TOKENS = 256
"""Rows of logits held at once: 10 MB of fp32 at a vocabulary of 10,000, which stays in a processor's cache."""


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """mean over the counted targets of −log softmax(h Wᵀ)[target], never holding more than 256 rows of logits.

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
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        # Two buffers serve all chunks: fresh ones of this size would cost more in page faults than the arithmetic.
        rows = min(CHUNK_TOKENS, len(h_ND))
        products = torch.empty(rows, len(weight), dtype=product_dtype, device=h_ND.device)
        values = torch.empty(rows, len(weight), dtype=dtype, device=h_ND.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h_ND), CHUNK_TOKENS):
                chunk = slice(start, start + CHUNK_TOKENS)
                h, index, share = h_ND[chunk].to(product_dtype), index_N[chunk, None], share_N[chunk, None]
                low, logits = products[: len(h)], values[: len(h)]
                torch.mm(h, weight.T, out=low)
                logits.copy_(low)
                logits.sub_(logits.amax(1, keepdim=True))
                picked = logits.gather(1, index)
                total = logits.exp_().sum(1, keepdim=True)
                loss += ((total.log() - picked) * share).sum()
                if not (wants_h or wants_weight):
                    continue
                slope = logits.mul_(share / total).scatter_add_(1, index, -share)  # (softmax − one-hot) / count
                low.copy_(slope)
                if grad_h is not None:
                    grad_h[chunk] = low @ weight
                if grad_weight is not None:
                    grad_weight += low.T @ h
        ctx.save_for_backward(*(g for g in (grad_h, grad_weight) if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
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
    products = torch.empty(rows, len(weight), dtype=product_dtype, device=h_ND.device)
    values = torch.empty(rows, len(weight), dtype=dtype, device=h_ND.device)
    for start in range(0, len(h_ND), CHUNK_TOKENS):
        h, target = h_ND[start : start + CHUNK_TOKENS].to(product_dtype), target_N[start : start + CHUNK_TOKENS]
        low, logits = products[: len(h)], values[: len(h)]
        torch.mm(h, weight.T, out=low)
        logits.copy_(low)
        losses_N[start : start + len(h)] = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    return losses_N


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The same mean from logits that are at hand anyway, in fp32 or wider."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    total = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORE, reduction="sum")
    return total / (target_N != IGNORE).sum().clamp(min=1)
