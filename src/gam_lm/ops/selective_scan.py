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

from gam_lm.ops.first_derivative import refuse_second_derivative

LOG2_E = math.log2(math.e)
"""exp(x) = 2^(x log2 e): on a CPU the power of 2 stays quick where it nearly vanishes, which is where exp takes thirty times as long (docs/log.md)."""

RECOMPUTED_NUMBERS = 2**21
"""States that the backward pass holds at once, and as many decays: 8 MB of fp32 each."""

STRETCH = 16
"""Tokens between two states that gam_lm.ops.selective_scan_numba keeps for the backward pass, which finds those between again."""

SLAB = 2**17
"""Numbers that a CPU works on at once, if it can: half a megabyte of fp32, of which a few stay in a core's cache."""


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
    """Run the recurrence over a sequence in L + T/L sequential steps (`chunk_length`).

    Args:
        x_BTE: input.
        dt_BTE: step sizes ≥ 0; a token of step size 0 changes nothing.
        A_NE: decay rates ≤ 0.
        B_BTN: what a token writes to.
        C_BTN: what a token reads.
        state_BNE: before the first token; None is zero.
        chunk_size: least length of a chunk, of no influence on the result but rounding.
        index_BT: number of sequence starts in the row so far (see gam_lm.ops.segments); the state is cleared where it changes.

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
        if x.shape[1] == 0 or len(x) == 0:
            return x, state_BNE
        if x.shape[1] == 1:
            return _one_step(x, dt, A, B, C, state_BNE, index_BT)
        rows, T, E = x.shape
        L = chunk_length(rows, T, len(A) * E, chunk_size, x.device.type)
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
        u, dt, C = (_places(each, L, -2) for each in (u_BTE, dt_BTE, C_BTN))
        B = _places(B_BTN, L, -1)
        keep, rate_NE = _keeps(index_BT, L, h.dtype), A_NE * LOG2_E
        stride = recomputed_places(L, h.numel())
        kept, y, decay = [], [], torch.empty_like(h)
        for t in range(L):
            if t % stride == 0:
                kept.append(h.clone())
            h.mul_(_decay(dt[t], rate_NE, keep[t], decay)).addcmul_(B[t], u[t])
            y.append(torch.bmm(C[t], h))
        ctx.save_for_backward(u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, torch.stack(kept), index_BT)
        ctx.sizes = L, stride
        return torch.cat(y, 1).view_as(u_BTE), h.unflatten(0, (len(u_BTE), -1))[:, -1].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("the selective scan", "differentiate gam_lm.ops.selective_scan.naive_selective_scan")
        u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, kept_KRNE, index_BT = ctx.saved_tensors
        L, stride = ctx.sizes
        slope_BTE, slope_last_BNE = grads
        u, dt, slope, B_row = (_places(each, L, -2) for each in (u_BTE, dt_BTE, slope_BTE, B_BTN))
        B, C = (_places(each, L, -1) for each in (B_BTN, C_BTN))
        keep, rate_NE = _keeps(index_BT, L, A_NE.dtype), A_NE * LOG2_E
        g = _chunk_ends(slope_BTE, dt_BTE, A_NE, C_BTN, slope_last_BNE, index_BT, L)
        grad_u, grad_dt, grad_B, grad_C = [], [], [], []  # from the last place to the first
        grad_A_RNE, q = torch.zeros_like(g), torch.empty_like(g)
        h = g.new_empty(stride + 1, *g.shape).unbind()  # the state before each place of a stretch, and after its last
        decay = g.new_empty(stride, *g.shape).unbind()
        for first in reversed(range(0, L, stride)):
            stretch = range(first, min(first + stride, L))
            h[0].copy_(kept_KRNE[first // stride])
            for i, t in enumerate(stretch):
                torch.mul(h[i], _decay(dt[t], rate_NE, keep[t], decay[i]), out=h[i + 1])
                h[i + 1].addcmul_(B[t], u[t])
            for i, t in reversed(list(enumerate(stretch))):
                # g is dL/dh_t without what comes from y_t. Multiply and sum: a product by a column is far slower.
                grad_C.append(torch.mul(h[i + 1], slope[t], out=q).sum(2))
                g.addcmul_(C[t], slope[t])
                grad_u.append(torch.bmm(B_row[t], g))
                grad_B.append(torch.mul(g, u[t], out=q).sum(2))
                torch.mul(g.mul_(decay[i]), h[i], out=q)  # dL/d(dt A)
                grad_A_RNE.addcmul_(q, dt[t])
                grad_dt.append(q.mul_(A_NE).sum(1))
        first_BNE = g.unflatten(0, (len(u_BTE), -1))[:, 0].clone()
        return (
            torch.cat(grad_u[::-1], 1).view_as(u_BTE), torch.stack(grad_dt[::-1], 1).view_as(dt_BTE), grad_A_RNE.sum(0),
            torch.stack(grad_B[::-1], 1).view_as(B_BTN), torch.stack(grad_C[::-1], 1).view_as(C_BTN), first_BNE, None, None,
        )  # fmt: skip


def goes_on(index_BT: Tensor) -> Tensor:
    """Whether a token's sequence is that of the token before, or of the state before the row (B, T)."""
    return index_BT == torch.cat([torch.zeros_like(index_BT[:, :1]), index_BT[:, :-1]], 1)


def chunk_length(rows: int, tokens: int, state_numbers: int, chunk_size: int, device_type: str) -> int:
    """L: ``chunk_size``, and on a CPU as much more as leaves a place, over all rows and chunks, `SLAB` numbers of state.

    A GPU wants few steps of much work each; a CPU wants work that stays in its cache, and no more chunks than that takes, since the carry between
    them costs as many exponentials as the walk.
    """
    if device_type == "cpu":
        chunks = max(1, SLAB // (rows * state_numbers))
        chunk_size = max(chunk_size, math.ceil(tokens / chunks))
    return min(tokens, chunk_size)


def recomputed_places(L: int, numbers: int) -> int:
    """How many places of a chunk lie between two states that are kept, where a place has so many numbers."""
    return max(1, min(L, RECOMPUTED_NUMBERS // numbers))


def _places(x_BTX: Tensor, L: int, dim: int) -> tuple[Tensor, ...]:
    """For each place of a chunk what all chunks have there, (R, ·) with a dimension of size 1 put in at ``dim``."""
    return x_BTX.reshape(-1, L, x_BTX.shape[-1]).transpose(0, 1).contiguous().unsqueeze(dim).unbind()


def _keeps(index_BT: Tensor | None, L: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """For each place of a chunk, (R, 1, 1): 1 where a token's sequence goes on from the token before, 0 where it starts. None: all go on."""
    if index_BT is None:
        return (None,) * L
    return _places(goes_on(index_BT).to(dtype)[..., None], L, -1)


def _decay(dt_R1E: Tensor, rate_NE: Tensor, keep_R11: Tensor | None, out_RNE: Tensor) -> Tensor:
    """2^(dt rate) into ``out_RNE``, 0 at the start of a sequence."""
    torch.mul(dt_R1E, rate_NE, out=out_RNE).exp2_()
    return out_RNE if keep_R11 is None else out_RNE.mul_(keep_R11)


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


def _chunk_ends(slope: Tensor, dt: Tensor, A_NE: Tensor, C: Tensor, slope_last_BNE: Tensor, index_BT: Tensor | None, L: int) -> Tensor:
    """The gradient that reaches each chunk's last state from the chunks after it (R, N, E)."""
    J = slope.shape[1] // L
    if J == 1:
        return slope_last_BNE.clone()
    slope, dt, C = (each.unflatten(1, (J, L))[:, 1:] for each in (slope, dt, C))  # what comes before the first chunk is the walk's to find
    sum_BJLE = dt.cumsum(2)
    if index_BT is not None:
        index_BJL = index_BT.unflatten(1, (J, L))
        before_BJ, index_BJL = index_BJL[:, :-1, -1], index_BJL[:, 1:]
        slope = slope * (index_BJL == before_BJ[..., None])[..., None]
    added = _summaries(slope, sum_BJLE, A_NE, C)
    decay_BJNE = torch.exp(sum_BJLE[:, :, -1, None] * A_NE)
    if index_BT is not None:
        decay_BJNE = decay_BJNE * (index_BJL[:, :, -1] == before_BJ)[..., None, None]
    ends = [slope_last_BNE]
    for j in reversed(range(J - 1)):
        ends.append(torch.addcmul(added[:, j], decay_BJNE[:, j], ends[-1]))
    return torch.stack(ends[::-1], 1).flatten(0, 1)


def _unbroken(index_BJL: Tensor) -> Tensor:
    """Whether no sequence starts within a chunk (B, J), its first token included."""
    before_BJ = torch.cat([torch.zeros_like(index_BJL[:, :1, 0]), index_BJL[:, :-1, -1]], 1)
    return index_BJL[:, :, -1] == before_BJ


def naive_selective_scan(
    x_BTE: Tensor, dt_BTE: Tensor, A_NE: Tensor, B_BTN: Tensor, C_BTN: Tensor, state_BNE: Tensor, index_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it stands, a token at a time, for tests."""
    outputs = []
    for t in range(x_BTE.shape[1]):
        decay_BNE = torch.exp(dt_BTE[:, t, None] * A_NE)
        if index_BT is not None:
            before_B = index_BT[:, t - 1] if t else torch.zeros_like(index_BT[:, 0])
            decay_BNE = decay_BNE * (index_BT[:, t] == before_B)[:, None, None]
        state_BNE = decay_BNE * state_BNE + B_BTN[:, t, :, None] * (dt_BTE * x_BTE)[:, t, None]
        outputs.append((C_BTN[:, t, :, None] * state_BNE).sum(1))
    return torch.stack(outputs, 1), state_BNE
