"""The cross-entropy of a language model without its logits: a vocabulary of 10,000 makes them most of a training step's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that is not predicted."""

CHUNK_TOKENS = 512


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """mean over the counted targets of −log softmax(h Wᵀ)[target], never holding more than 512 rows of logits.

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
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(product_dtype)
        dtype = torch.promote_types(product_dtype, torch.float32)
        counted = (target_N != IGNORE).sum().clamp(min=1)
        loss = torch.zeros((), dtype=dtype, device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if wants_h else None
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h_ND), CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                h, target = h_ND[rows].to(product_dtype), target_N[rows]
                logits = (h @ weight.T).to(dtype)
                log_sum = logits.logsumexp(-1, keepdim=True)
                keep = target != IGNORE
                index = target.where(keep, 0)[:, None]
                loss += ((log_sum - logits.gather(1, index)).squeeze(1) * keep).sum()
                if not (wants_h or wants_weight):
                    continue
                slope = logits.sub_(log_sum).exp_()  # softmax, in place
                slope.scatter_add_(1, index, slope.new_full((), -1.0).expand(index.shape))
                slope = slope.mul_((keep.to(dtype) / counted)[:, None]).to(product_dtype)
                if grad_h is not None:
                    grad_h[rows] = (slope @ weight).to(grad_h.dtype)
                if grad_weight is not None:
                    grad_weight += slope.T @ h
        ctx.save_for_backward(*(g for g in (grad_h, grad_weight) if g is not None))
        return loss / counted

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = list(ctx.saved_tensors)
        grads = [saved.pop(0) * grad_outputs[0] if wanted else None for wanted in ctx.needs_input_grad[:2]]
        return grads[0], grads[1], None


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The same mean from logits that are at hand anyway, in fp32 or wider."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    total = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORE, reduction="sum")
    return total / (target_N != IGNORE).sum().clamp(min=1)
