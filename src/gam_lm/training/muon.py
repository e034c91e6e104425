"""Muon: momentum whose update of a weight matrix is replaced by the nearest matrix that turns and reflects alone (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon).

    M ← μ M + (1 − μ) G                       momentum
    U = (1 − μ) G + μ M                       Nesterov
    O ≈ U (UᵀU)^(−1/2)                        orthogonalised, by five steps of Newton–Schulz
    W ← (1 − ηλ) W − η √max(1, rows / columns) O

Shapes: a matrix is rows × columns, as nn.Linear keeps it: outputs × inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gam_lm.errors import InputError
from gam_lm.ops.number_formats import has_bf16
from gam_lm.training.sharding import is_sharded, local
from gam_lm.training.spread import matrices_of, shares, spread_rows, spread_whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x ↦ ax + bx³ + cx⁵, whose five-fold repetition takes singular values of 0.01 … 1 to 0.7 … 1.2: as steep at zero as can be."""

STEPS = 5
MOMENTUM = 0.95


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Keep the singular vectors of each matrix and bring its singular values near 1.

    Args:
        matrices: (..., rows, columns).
        dtype: of the products; None takes bf16 on GPUs that multiply it natively, else fp32 (fp64 stays fp64). A CPU always computes in fp32, so that every
            CPU makes the same run.

    Returns:
        Matrices of the same shape, in the dtype of the products.
    """
    if dtype is None:
        native = matrices.device.type == "cuda" and has_bf16(matrices.device)
        dtype = torch.bfloat16 if native else torch.promote_types(matrices.dtype, torch.float32)
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if upright else matrices).to(dtype)
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).reshape(-1, *x.shape[-2:])
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram²) x
    return (x.mT if upright else x).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """The optimiser of hidden weight matrices; embeddings, output heads and vectors need another.

    Args:
        matrices: each parameter (rows, columns) with the row counts of the logical matrices that it is stacked from, which are
            orthogonalised apart: a fused projection of queries, keys and values gets the update of three projections.
        lr: learning rate η.
        weight_decay: λ, decoupled; a parameter with the attribute ``no_weight_decay = True`` does not decay.
        momentum: μ.
        processes: that hold the same weights, or shards of them, and make the same steps: each orthogonalises a share of the matrices. More than one are
            all processes of torch.distributed.

    Raises:
        InputError: for a parameter that is no matrix, or row counts that do not add up to its rows.
    """

    def __init__(
        self, matrices: Iterable[tuple[nn.Parameter, Sequence[int]]], lr: float = 0.02, weight_decay: float = 0.0, momentum: float = MOMENTUM,
        processes: int = 1,
    ) -> None:  # fmt: skip
        found = [(parameter, tuple(rows)) for parameter, rows in matrices]
        for parameter, rows in found:
            if parameter.dim() != 2 or sum(rows) != len(parameter) or min(rows) < 1:
                raise InputError(f"blocks of {list(rows)} rows do not make up a weight of shape {list(parameter.shape)}: name all rows of a matrix")
        self._processes = processes
        self._rows = {parameter: rows for parameter, rows in found}
        kept = [parameter for parameter, _ in found if getattr(parameter, "no_weight_decay", False)]
        groups = [{"params": [parameter for parameter, _ in found if parameter not in set(kept)], "weight_decay": weight_decay}]
        super().__init__([*groups, {"params": kept, "weight_decay": 0.0}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None  # no caller has one
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            for p in moved:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            # Of sharded weights each process moves its rows; only the matrices are whole, while they are orthogonalised.
            momenta, gradients = [local(self.state[p]["momentum"]) for p in moved], [local(p.grad) for p in moved]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            self._orthogonalize(moved, updates)
            torch._foreach_mul_([local(p) for p in moved], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_([local(p) for p in moved], updates, alpha=-group["lr"])

    def _orthogonalize(self, moved: Sequence[Any], updates: Sequence[Tensor]) -> None:
        """Orthogonalise the logical matrices of ``updates`` in place, over several processes each its share."""
        matrices = matrices_of([p.shape for p in moved], [self._rows[p] for p in moved])
        if self._processes == 1:
            _orthogonalize_blocks([updates[m.parameter][m.start : m.end] for m in matrices])
        else:
            spread = spread_rows if is_sharded(moved[0]) else spread_whole
            spread(updates, shares(matrices, self._processes), _orthogonalize_blocks)


def _orthogonalize_blocks(blocks: Sequence[Tensor]) -> None:
    """Orthogonalise and scale each block in place; blocks of one shape go through the products together."""
    alike = defaultdict(list)
    for block in blocks:
        alike[min(block.shape), max(block.shape), block.dtype, block.device].append(block)
    for same in alike.values():
        stacked = torch.stack([block.mT if block.shape[0] > block.shape[1] else block for block in same])
        for block, found in zip(same, orthogonalize(stacked), strict=True):
            rows, columns = block.shape
            block.copy_(found.mT if rows > columns else found).mul_(max(1, rows / columns) ** 0.5)
