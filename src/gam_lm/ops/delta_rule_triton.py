"""The delta rule as a Triton kernel: one program a sequence, head and block of values, which keeps the state in registers from chunk to chunk.

The equations are those of gam_lm.ops.delta_rule with V0 taken out: u = v − V0ᵀa is written, V0ᵀr is added to what is read. Within a chunk

    A = tril(b (a aᵀ) ∘ mask, −1)        W = (I + A)⁻¹ b (u − e^G a D)        g = e^G r D + (r aᵀ ∘ mask) W

The inverse doubles: where X inverts the diagonal blocks of s rows of I + A, and C is what stands left of them in blocks of 2s rows, X − X C X inverts those.
It is substitution by blocks, so that no power of A is ever formed. The backward pass runs the states again and keeps nothing but the inputs.

Products are taken in the dtype of the values, the system, the decays and the state in fp32. Letters as there; P, S are M and E filled up to a power of 2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gam_lm.ops.segments import Packed, pack, whole_rows
from gam_lm.ops.triton_tiles import dot, put, rounded, tile

CHUNK = 32
"""L. The tiles of L × L share the registers with the state: on an H200, 64 tokens of bf16 took twice the time of 16 or 32 (docs/log.md)."""

VALUES = 64
"""The largest E of a program, which holds the state of it and of M in registers."""

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""Of the values."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET was set at import: the kernels run as numpy, on a CPU."""


@torch.library.custom_op("gam_lm::delta_rule", mutates_args=())
def delta_rule(
    read: Tensor, write: Tensor, value: Tensor, gate: Tensor, log_decay: Tensor, first: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the written part of the memory gives.

    Args:
        read: r (B, T, H, M) in the format of the values, as ``write``, a.
        value: u (B, T, H, E) in one of `FORMATS`.
        gate: b (B, T, H) in fp32, as ``log_decay``.
        first: the states (B, H, M, E) in fp32 before the rows, or None.
        index: the sequences of each row (gam_lm.ops.segments.Segments.index_BT), or None for one.

    Returns:
        D_tᵀ r_t for every token in the format of the values, and D (B, H, M, E) after the rows in fp32.
    """
    call = _Call(read, write, value, gate, log_decay, first, index)
    g, last = _buffer(value.shape, value), _buffer(call.state_shape, value, torch.float32)
    call.forward(g, last, None)
    return g, last


@delta_rule.register_fake
def _shapes(
    read: Tensor, write: Tensor, value: Tensor, gate: Tensor, log_decay: Tensor, first: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, _, H, M = read.shape
    return value.new_empty(value.shape), value.new_empty((B, H, M, value.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("gam_lm::delta_rule_backward", mutates_args=())
def _delta_rule_backward(
    read: Tensor, write: Tensor, value: Tensor, gate: Tensor, log_decay: Tensor, first: Tensor | None, index: Tensor | None, dg: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(read, write, value, gate, log_decay, first, index)
    starts = _buffer((call.chunks, *call.state_shape[1:]), value, torch.float32)
    call.forward(value, dlast, starts)
    return call.backward(dg.contiguous(), dlast.contiguous(), starts)


@_delta_rule_backward.register_fake
def _shapes_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    return (*(each.new_empty(each.shape) for each in tensors[:5]), tensors[8].new_empty(tensors[8].shape))


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dg: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dfirst = _delta_rule_backward(*ctx.saved_tensors, dg, dlast)
    return *gradients, None if ctx.saved_tensors[5] is None else dfirst, None


delta_rule.register_autograd(_gradient, setup_context=_save)


def _buffer(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory that the kernels fill."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _places(rows: Packed, B: int, continued: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each sequence: where it starts (N + 1), the row whose first state it goes on from, the row whose last state it leaves, −1 for none, and its first chunk."""
    none_N = torch.full_like(rows.row_N, -1)
    last_row_N = none_N.clone()
    last_row_N[rows.last_B] = torch.arange(B, device=none_N.device)
    first_row_N = torch.where(rows.continues_N, rows.row_N, none_N) if continued else none_N
    count_N = (rows.cu_seqlens.diff() + CHUNK - 1) // CHUNK
    return rows.cu_seqlens, first_row_N, last_row_N, count_N.cumsum(0) - count_N


@lru_cache(maxsize=64)
def _whole_places(B: int, T: int, continued: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows that are a sequence each: the same in every layer and step, and a dozen launches to find."""
    with torch.inference_mode(False):
        return _places(whole_rows(B, T, device), B, continued)


class _Call:
    """The arguments of the kernels for one call."""

    def __init__(
        self, read: Tensor, write: Tensor, value: Tensor, gate: Tensor, log_decay: Tensor, first: Tensor | None, index: Tensor | None
    ) -> None:
        B, T, H, M = read.shape
        E = value.shape[-1]
        L, P = CHUNK, max(16, triton.next_power_of_2(M))
        self.places = _whole_places(B, T, first is not None, read.device) if index is None else _places(pack(index), B, first is not None)
        N = len(self.places[1])
        self.inputs = [each.contiguous() for each in (read, write, value, gate, log_decay)]
        self.first = (gate if first is None else first).contiguous()  # of no sequence, where none is given
        self.state_shape, self.chunks = (B, H, M, E), B * T // L + N
        S = min(VALUES, max(16, triton.next_power_of_2(E)))
        self.blocks = triton.cdiv(E, S)
        self.grid = (N * H, self.blocks)
        self.options: dict[str, Any] = {
            "L": L, "P": P, "S": S, "LEVELS": L.bit_length() - 1,
            "EXACT": "interpreted" if INTERPRETED else "tf32x3",  # as exact as fp32, on tensor cores
            "num_warps": 4 if P <= 64 and value.dtype != torch.float32 else 8, "num_stages": 1,
        }  # fmt: skip

    def forward(self, g: Tensor, last: Tensor, starts: Tensor | None) -> None:
        """Fill ``g`` and ``last``, or if given ``starts`` alone: the states before each chunk."""
        _, H, M, E = self.state_shape
        with torch.cuda.device_of(g):  # Triton launches on the current device, whatever its tensors lie on
            _forward[self.grid](
                *self.inputs, self.first, g, last, last if starts is None else starts, *self.places, H, M, E, STARTS=starts is not None, **self.options
            )  # fmt: skip

    def backward(self, dg: Tensor, dlast: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of all inputs and of the first state, zeros where there is none."""
        read, write, value, gate, log_decay = self.inputs
        _, H, M, E = self.state_shape
        # Of what all blocks of values share, each block has a part of its own.
        shared = [
            _buffer((self.blocks, *each.shape), each, each.dtype if self.blocks == 1 else torch.float32) for each in (read, write, gate, log_decay)
        ]
        dvalue, dfirst = _buffer(value.shape, value), torch.zeros_like(dlast)
        with torch.cuda.device_of(dg):
            _backward[self.grid](
                *self.inputs, starts, dg, dlast, *shared, dvalue, dfirst, *self.places, read.shape[0] * read.shape[1], H, M, E, **self.options
            )  # fmt: skip
        dread, dwrite, dgate, ddecay = (each.sum(0).to(like.dtype) for each, like in zip(shared, (read, write, gate, log_decay), strict=True))
        return dread, dwrite, dvalue, dgate, ddecay, dfirst


@triton.jit
def _decays(log_L, L: tl.constexpr):
    """What lasts from token to token, from the chunk's start, to its end, and over it. Sums are fp64: fp32 would lose digits of every small difference."""
    i_L = tl.arange(0, L)
    sum_L, total = tl.cumsum(log_L.to(tl.float64), 0), tl.sum(log_L.to(tl.float64), 0)
    high_L = sum_L.to(tl.float32)
    rest_L = (sum_L - high_L.to(tl.float64)).to(tl.float32)
    between_LL = (high_L[:, None] - high_L[None, :]) + (rest_L[:, None] - rest_L[None, :])
    mask_LL = tl.where(i_L[:, None] >= i_L[None, :], tl.exp(tl.minimum(between_LL, 0.0)), 0.0)
    return mask_LL, tl.exp(high_L), tl.exp(tl.minimum((total - sum_L).to(tl.float32), 0.0)), tl.exp(total.to(tl.float32))


@triton.jit
def _system(r_LP, a_LP, b_L, mask_LL, L: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """The scores of reads and of writes, and (I + A)⁻¹."""
    i_L1, i_1L = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    reads_LL = dot(r_LP, tl.trans(a_LP), EXACT)
    writes_LL = dot(a_LP, tl.trans(a_LP), EXACT)
    A_LL = tl.where(i_L1 > i_1L, b_L[:, None] * writes_LL * mask_LL, 0.0)
    inverse_LL = tl.where(i_L1 == i_1L, 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        left_LL = (i_L1 >> level != i_1L >> level) & (i_L1 >> (level + 1) == i_1L >> (level + 1))
        C_LL = tl.where(left_LL, A_LL, 0.0)
        if level == 0:
            inverse_LL -= C_LL
        else:
            inverse_LL -= dot(dot(inverse_LL, C_LL, EXACT), inverse_LL, EXACT)
    return reads_LL, writes_LL, inverse_LL


@triton.jit
def _forward(
    read, write, value, gate, log_decay, first, g, last, starts, cu_seqlens, first_row, last_row, chunk, H, M, E,
    L: tl.constexpr, P: tl.constexpr, S: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    m_P, e_S, i_L = tl.arange(0, P), tl.program_id(1) * S + tl.arange(0, S), tl.arange(0, L)
    begin, end, row, j = tl.load(cu_seqlens + n), tl.load(cu_seqlens + n + 1), tl.load(first_row + n), tl.load(chunk + n)
    D_PS = tl.zeros((P, S), tl.float32)
    if row >= 0:
        D_PS = tile(first + (row * H + h) * M * E, m_P, M, e_S, E, E)
    for start in range(begin, end, L):
        if STARTS:
            put(starts + (j * H + h) * M * E, D_PS, m_P, M, e_S, E, E, EXACT)
        T, token = end - start, start * H + h
        r_LP, a_LP = tile(read + token * M, i_L, T, m_P, M, H * M), tile(write + token * M, i_L, T, m_P, M, H * M)
        u_LS = tile(value + token * E, i_L, T, e_S, E, H * E)
        b_L = tl.load(gate + token + i_L * H, mask=i_L < T, other=0.0)
        log_L = tl.load(log_decay + token + i_L * H, mask=i_L < T, other=0.0)
        mask_LL, from_start_L, to_end_L, keep = _decays(log_L, L)
        reads_LL, _, inverse_LL = _system(r_LP, a_LP, b_L, mask_LL, L, LEVELS, EXACT)
        D_low = rounded(D_PS, value, EXACT)
        error_LS = u_LS - from_start_L[:, None] * dot(a_LP, D_low, EXACT)
        W_LS = rounded(dot(rounded(inverse_LL * b_L[None, :], value, EXACT), rounded(error_LS, value, EXACT), EXACT), value, EXACT)
        if not STARTS:
            g_LS = from_start_L[:, None] * dot(r_LP, D_low, EXACT) + dot(rounded(reads_LL * mask_LL, value, EXACT), W_LS, EXACT)
            put(g + token * E, g_LS, i_L, T, e_S, E, H * E, EXACT)
        D_PS = keep * D_PS + dot(tl.trans(rounded(a_LP * to_end_L[:, None], value, EXACT)), W_LS, EXACT)
        j += 1
    if not STARTS:
        row = tl.load(last_row + n)
        if row >= 0:
            put(last + (row * H + h) * M * E, D_PS, m_P, M, e_S, E, E, EXACT)


@triton.jit
def _backward(
    read, write, value, gate, log_decay, starts, dg, dlast, dread, dwrite, dgate, ddecay, dvalue, dfirst, cu_seqlens, first_row, last_row, chunk, tokens, H, M, E,
    L: tl.constexpr, P: tl.constexpr, S: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    m_P, e_S, i_L = tl.arange(0, P), tl.program_id(1) * S + tl.arange(0, S), tl.arange(0, L)
    begin, end, row, j = tl.load(cu_seqlens + n), tl.load(cu_seqlens + n + 1), tl.load(last_row + n), tl.load(chunk + n)
    part = tl.program_id(1).to(tl.int64) * tokens * H
    dD_PS = tl.zeros((P, S), tl.float32)
    if row >= 0:
        dD_PS = tile(dlast + (row * H + h) * M * E, m_P, M, e_S, E, E)
    count = (end - begin + L - 1) // L
    for back in range(count):
        c = count - 1 - back
        start = begin + c * L
        T, token = end - start, start * H + h
        r_LP, a_LP = tile(read + token * M, i_L, T, m_P, M, H * M), tile(write + token * M, i_L, T, m_P, M, H * M)
        u_LS, dg_LS = tile(value + token * E, i_L, T, e_S, E, H * E), tile(dg + token * E, i_L, T, e_S, E, H * E)
        b_L = tl.load(gate + token + i_L * H, mask=i_L < T, other=0.0)
        log_L = tl.load(log_decay + token + i_L * H, mask=i_L < T, other=0.0)
        mask_LL, from_start_L, to_end_L, keep = _decays(log_L, L)
        reads_LL, writes_LL, inverse_LL = _system(r_LP, a_LP, b_L, mask_LL, L, LEVELS, EXACT)
        solved_LL = rounded(inverse_LL * b_L[None, :], value, EXACT)
        D_PS = tile(starts + ((j + c) * H + h) * M * E, m_P, M, e_S, E, E)
        D_low, dD_low = rounded(D_PS, value, EXACT), rounded(dD_PS, value, EXACT)
        met_LS = dot(a_LP, D_low, EXACT)
        error_LS = rounded(u_LS - from_start_L[:, None] * met_LS, value, EXACT)
        W_LS = rounded(dot(solved_LL, error_LS, EXACT), value, EXACT)

        # What was written: read within the chunk, and carried to its end. Then the errors it was solved from.
        dW_LS = dot(tl.trans(rounded(reads_LL * mask_LL, value, EXACT)), dg_LS, EXACT)
        dW_LS = rounded(dW_LS + to_end_L[:, None] * dot(a_LP, dD_low, EXACT), value, EXACT)
        derror_LS = dot(tl.trans(solved_LL), dW_LS, EXACT)
        put(dvalue + token * E, derror_LS, i_L, T, e_S, E, H * E, EXACT)
        dfound_LS, dmet_LS = rounded(dg_LS * from_start_L[:, None], value, EXACT), rounded(-derror_LS * from_start_L[:, None], value, EXACT)

        # The system: d(X⁻¹) = −X⁻ᵀ dX X⁻ᵀ, below the diagonal.
        dsolved_LL = dot(dW_LS, tl.trans(error_LS), EXACT)
        dA_LL = dot(tl.trans(inverse_LL), dsolved_LL * b_L[None, :], EXACT)
        dA_LL = -dot(dA_LL, tl.trans(inverse_LL), EXACT) * mask_LL
        dA_LL = tl.where(i_L[:, None] > i_L[None, :], dA_LL, 0.0)
        dreads_LL = dot(dg_LS, tl.trans(W_LS), EXACT) * mask_LL
        db_L = tl.sum(dsolved_LL * inverse_LL, 0) + tl.sum(dA_LL * writes_LL, 1)
        dwrites_LL = dA_LL * b_L[:, None]
        dmask_LL = dreads_LL * reads_LL + dwrites_LL * writes_LL

        # Addresses.
        dreads_low, dwrites_low = rounded(dreads_LL, value, EXACT), rounded(dwrites_LL, value, EXACT)
        dr_LP = dot(dfound_LS, tl.trans(D_low), EXACT) + dot(dreads_low, a_LP, EXACT)
        dinto_LP = dot(W_LS, tl.trans(dD_low), EXACT)
        da_LP = dot(dmet_LS, tl.trans(D_low), EXACT) + dinto_LP * to_end_L[:, None] + dot(dwrites_low, a_LP, EXACT)
        da_LP += dot(tl.trans(dreads_low), r_LP, EXACT) + dot(tl.trans(dwrites_low), a_LP, EXACT)
        put(dread + (part + token) * M, dr_LP, i_L, T, m_P, M, H * M, EXACT)
        put(dwrite + (part + token) * M, da_LP, i_L, T, m_P, M, H * M, EXACT)

        # Gates and decays, whose running sums every later token of the chunk has.
        dstart_L = tl.sum(dg_LS * dot(r_LP, D_low, EXACT), 1) - tl.sum(derror_LS * met_LS, 1)
        ended_L = tl.sum(dinto_LP * a_LP, 1) * to_end_L
        dsum_L = tl.sum(dmask_LL, 1) - tl.sum(dmask_LL, 0) + dstart_L * from_start_L - ended_L
        dtotal = tl.sum(ended_L, 0) + tl.sum(tl.sum(D_PS * dD_PS, 1), 0) * keep
        tl.store(dgate + part + token + i_L * H, db_L, mask=i_L < T)
        tl.store(ddecay + part + token + i_L * H, tl.cumsum(dsum_L.to(tl.float64), 0, reverse=True).to(tl.float32) + dtotal, mask=i_L < T)

        dD_PS = keep * dD_PS + dot(tl.trans(r_LP), dfound_LS, EXACT) + dot(tl.trans(a_LP), dmet_LS, EXACT)
    row = tl.load(first_row + n)
    if row >= 0:
        put(dfirst + (row * H + h) * M * E, dD_PS, m_P, M, e_S, E, E, EXACT)
