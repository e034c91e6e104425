"""The selective scan of Mamba (Gu & Dao, arXiv 2312.00752, section 3.3), chunked, in plain PyTorch.

    h_t = exp(dt_t A) ∘ h_{t−1} + dt_t x_t ⊗ B_t            y_t = C_t · h_t

Every channel of every state decays at its own rate, so that the scan is no matrix product; what can be done is to run all chunks of the
sequence side by side. First the carry: what a chunk adds to the state is a sum over its tokens, found for all chunks at once, and a walk over
the chunks gives the state at the start of each. Then one walk over the places within a chunk, for all chunks at once, from those states. No exponent
is ever positive: decays are exp of sums of dt·A ≤ 0. The backward pass does the same in the other direction and keeps only a few
states, from which it finds all others again.

Shapes: B rows, T tokens, E channels, N states per channel, J chunks, L tokens per chunk, R = B·J.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
"""exp(x) = 2^(x log2 e): on a CPU the power of 2 takes a third of the time."""

RECOMPUTED_NUMBERS = 2**22
"""States that the backward pass holds at once: 16 MB of fp32."""


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_NE: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BNE: Tensor | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence in chunk + T/chunk sequential steps.

    Args:
        x_BTE: input.
        dt_BTE: step sizes ≥ 0; a token of step size 0 changes nothing.
        A_NE: decay rates ≤ 0.
        B_BTN: what a token writes to.
        C_BTN: what a token reads.
        state_BNE: before the first token; None is zero.
        chunk_size: L, of no influence on the result but rounding.
        index_BT: number of sequence starts in the row so far (see gam_lm.segments); the state is cleared where it changes.

    Returns:
        y (B, T, E) and the state after the last token (B, N, E), both in fp32, or fp64 where an input is.
    """
    dtype = torch.float32
    for each in (x_BTE, dt_BTE, A_NE, B_BTN, C_BTN):
        dtype = torch.promote_types(dtype, each.dtype)
    with torch.autocast(x_BTE.device.type, enabled=False):
        x, dt, A, B, C = (each.to(dtype) for each in (x_BTE, dt_BTE, A_NE, B_BTN, C_BTN))
        if state_BNE is None:
            state_BNE = x.new_zeros(len(x), *A.shape)
        state_BNE = state_BNE.to(dtype)
        if x.shape[1] == 1:
            return _one_step(x, dt, A, B, C, state_BNE, index_BT)
        T, L = x.shape[1], min(chunk_size, x.shape[1])
        missing = -T % L  # tokens of step size 0 fill the last chunk
        if missing:
            x, dt, B, C = (F.pad(each, (0, 0, 0, missing)) for each in (x, dt, B, C))
            index_BT = None if index_BT is None else torch.cat([index_BT, index_BT[:, -1:].expand(-1, missing)], 1)
        y_BTE, last_BNE = _Scan.apply(dt * x, dt, A, B, C, state_BNE, index_BT, L)
        return y_BTE[:, :T], last_BNE


def _one_step(x: Tensor, dt: Tensor, A_NE: Tensor, B: Tensor, C: Tensor, state_BNE: Tensor, index_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    decay_BNE = torch.exp(dt * A_NE)
    if index_B1 is not None:
        decay_BNE = decay_BNE * (index_B1 == 0)[..., None]
    state_BNE = torch.addcmul(decay_BNE * state_BNE, B.transpose(1, 2), dt * x)
    return torch.bmm(C, state_BNE), state_BNE


class _Scan(torch.autograd.Function):
    """The scan on whole chunks, with u = dt·x.

    The forward pass keeps the state at every few places of a chunk; the backward pass finds the states between two of them again, so many at
    once as stay in cache and in memory that the allocator gives back.
    """

    @staticmethod
    def forward(
        ctx: Any, u_BTE: Tensor, dt_BTE: Tensor, A_NE: Tensor, B_BTN: Tensor, C_BTN: Tensor, state_BNE: Tensor, index_BT: Tensor | None, L: int
    ) -> tuple[Tensor, Tensor]:
        h = _chunk_starts(u_BTE, dt_BTE, A_NE, B_BTN, state_BNE, index_BT, L)
        u, dt, B, C = (_chunks(each, L) for each in (u_BTE, dt_BTE, B_BTN, C_BTN))
        keep_RL, rate_NE = _keeps(index_BT, L), A_NE * LOG2_E
        stride = max(1, min(L, RECOMPUTED_NUMBERS // h.numel()))
        kept, decay, y_RLE = [], torch.empty_like(h), torch.empty_like(u)
        for t in range(L):
            if t % stride == 0:
                kept.append(h.clone())
            _decay(dt, rate_NE, keep_RL, t, decay)
            h.mul_(decay).addcmul_(B[:, t, :, None], u[:, t, None])
            y_RLE[:, t, None] = torch.bmm(C[:, t, None], h)
        ctx.save_for_backward(u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, torch.stack(kept), index_BT)
        ctx.sizes = L, stride
        return y_RLE.view_as(u_BTE), h.unflatten(0, (len(u_BTE), -1))[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, kept_KRNE, index_BT = ctx.saved_tensors
        L, stride = ctx.sizes
        slope_BTE, slope_last_BNE = grads[0].contiguous(), grads[1]
        u, dt, B, C, slope = (_chunks(each, L) for each in (u_BTE, dt_BTE, B_BTN, C_BTN, slope_BTE))
        keep_RL, rate_NE = _keeps(index_BT, L), A_NE * LOG2_E
        g, first_BNE = _chunk_ends(slope_BTE, dt_BTE, A_NE, C_BTN, slope_last_BNE, index_BT, L)
        grad_u, grad_dt, grad_B, grad_C = (torch.empty_like(each) for each in (u, dt, B, C))
        grad_A_NE = torch.zeros_like(A_NE)
        h = kept_KRNE.new_empty(stride + 1, *kept_KRNE.shape[1:])  # the state before each place of a stretch, and after its last
        decay, q, scratch = (torch.empty_like(g) for _ in range(3))
        for first in reversed(range(0, L, stride)):
            stretch = range(first, min(first + stride, L))
            h[0] = kept_KRNE[first // stride]
            for i, t in enumerate(stretch):
                _decay(dt, rate_NE, keep_RL, t, decay)
                torch.mul(h[i], decay, out=h[i + 1])
                h[i + 1].addcmul_(B[:, t, :, None], u[:, t, None])
            for i, t in reversed(list(enumerate(stretch))):
                # g is dL/dh_t without what comes from y_t. Multiply and sum: a product by a column is far slower.
                grad_C[:, t] = torch.mul(h[i + 1], slope[:, t, None], out=q).sum(2)
                g.addcmul_(C[:, t, :, None], slope[:, t, None])
                grad_u[:, t, None] = torch.bmm(B[:, t, None], g)
                grad_B[:, t] = torch.mul(g, u[:, t, None], out=q).sum(2)
                _decay(dt, rate_NE, keep_RL, t, decay)
                g.mul_(decay)
                torch.mul(g, h[i], out=q)  # dL/d(dt A)
                grad_A_NE += torch.mul(q, dt[:, t, None], out=scratch).sum(0)
                grad_dt[:, t] = q.mul_(A_NE).sum(1)
        return (
            grad_u.view_as(u_BTE), grad_dt.view_as(dt_BTE), grad_A_NE, grad_B.view_as(B_BTN), grad_C.view_as(C_BTN), first_BNE, None, None,
        )  # fmt: skip


def _chunks(x_BTX: Tensor, L: int) -> Tensor:
    """(B, T, ·) as (R, L, ·), the chunks of a row one after the other."""
    return x_BTX.contiguous().view(-1, L, x_BTX.shape[-1])


def _keeps(index_BT: Tensor | None, L: int) -> Tensor | None:
    """1 where a token's sequence goes on from the token before, 0 where it starts (R, L)."""
    if index_BT is None:
        return None
    before_BT = torch.cat([torch.zeros_like(index_BT[:, :1]), index_BT[:, :-1]], 1)
    return (index_BT == before_BT).view(-1, L)


def _decay(dt_RLE: Tensor, rate_NE: Tensor, keep_RL: Tensor | None, t: int, out_RNE: Tensor) -> None:
    """2^(dt_t rate) into ``out_RNE``, 0 at the start of a sequence."""
    torch.mul(dt_RLE[:, t, None], rate_NE, out=out_RNE)
    out_RNE.exp2_()
    if keep_RL is not None:
        out_RNE.mul_(keep_RL[:, t, None, None])


def _summaries(weight_BJLE: Tensor, exponent_BJLE: Tensor, A_NE: Tensor, pick_BJLN: Tensor) -> Tensor:
    """Σ_t exp(A·exponent_t) weight_t pick_t for every chunk (B, J, N, E), a state at a time so that it stays in cache."""
    states, rate_NE = [], A_NE * LOG2_E
    buffer = torch.empty_like(exponent_BJLE)
    for n in range(len(A_NE)):
        torch.mul(exponent_BJLE, rate_NE[n], out=buffer)
        buffer.exp2_().mul_(weight_BJLE)
        states.append(torch.matmul(pick_BJLN[..., None, :, n], buffer).squeeze(-2))
    return torch.stack(states, 2)


def _chunk_starts(u: Tensor, dt: Tensor, A_NE: Tensor, B: Tensor, state_BNE: Tensor, index_BT: Tensor | None, L: int) -> Tensor:
    """The state before each chunk (R, N, E)."""
    J = u.shape[1] // L
    if J == 1:
        return state_BNE.clone()
    u, dt, B = (each.contiguous().unflatten(1, (J, L))[:, :-1] for each in (u, dt, B))  # what the last chunk adds is not asked for
    sum_BJLE = dt.cumsum(2)
    rest_BJLE = sum_BJLE[:, :, -1:] - sum_BJLE  # of step sizes after t
    if index_BT is not None:
        index_BJL = index_BT.unflatten(1, (J, L))[:, :-1]
        u = u * (index_BJL == index_BJL[:, :, -1:])[..., None]
    added = _summaries(u, rest_BJLE, A_NE, B)
    decay_BJNE = torch.exp(sum_BJLE[:, :, -1, None] * A_NE)
    if index_BT is not None:
        decay_BJNE = decay_BJNE * _unbroken(index_BJL)[..., None, None]
    starts = [state_BNE]
    for j in range(J - 1):
        starts.append(torch.addcmul(added[:, j], decay_BJNE[:, j], starts[-1]))
    return torch.stack(starts, 1).flatten(0, 1)


def _chunk_ends(slope: Tensor, dt: Tensor, A_NE: Tensor, C: Tensor, slope_last_BNE: Tensor, index_BT: Tensor | None, L: int) -> tuple[Tensor, Tensor]:
    """The gradient that reaches each chunk's last state from the chunks after it (R, N, E), and that of the state before the first (B, N, E)."""
    J = slope.shape[1] // L
    slope, dt, C = (each.contiguous().unflatten(1, (J, L)) for each in (slope, dt, C))
    sum_BJLE = dt.cumsum(2)
    if index_BT is not None:
        index_BJL = index_BT.unflatten(1, (J, L))
        before_BJ = torch.cat([torch.zeros_like(index_BJL[:, :1, 0]), index_BJL[:, :-1, -1]], 1)
        slope = slope * (index_BJL == before_BJ[..., None])[..., None]
    added = _summaries(slope, sum_BJLE, A_NE, C)
    decay_BJNE = torch.exp(sum_BJLE[:, :, -1, None] * A_NE)
    if index_BT is not None:
        decay_BJNE = decay_BJNE * (index_BJL[:, :, -1] == before_BJ)[..., None, None]
    ends = [slope_last_BNE]
    for j in reversed(range(J)):
        ends.append(torch.addcmul(added[:, j], decay_BJNE[:, j], ends[-1]))
    return torch.stack(ends[-2::-1], 1).flatten(0, 1), ends[-1]


def _unbroken(index_BJL: Tensor) -> Tensor:
    """Whether no sequence starts within a chunk (B, J), its first token included."""
    before_BJ = torch.cat([torch.zeros_like(index_BJL[:, :1, 0]), index_BJL[:, :-1, -1]], 1)
    return index_BJL[:, :, -1] == before_BJ
