"""Mamba's selective scan as Triton kernels: one program a row, chunk and block of channels, all chunks of the sequence side by side.

    h_t = exp(dt_t A) ∘ h_{t−1} + dt_t x_t ⊗ B_t            y_t = C_t · h_t

Three kernels in a row. `_summaries` finds for each chunk what its tokens add to the state and what is left of the state before it, `_carry` walks over the chunks
for the state at the start of each, and `_forward` walks over the tokens of all chunks from there, with the state in registers. Backward it is the same in the other
direction: `_summaries` and `_carry` give the gradient at each chunk's end, `_backward` writes the states of its chunk down and walks back over them. So many chunks
run at once as `SCRATCH` has room for. No sum is taken by atomic additions: a repeated call gives the same bits.

Arithmetic is fp32, whatever the inputs. Shapes: B rows, T tokens, E channels, N states per channel, J chunks of L tokens; in the kernels P, S are N and a block
of channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gam_lm.ops.triton_tiles import rounded

CHUNK = 64
"""L."""

CHANNELS, WARPS = 32, 1
"""Channels of a program. It is one warp, so that what its threads exchange takes no barrier between warps."""

CARRIED = 128
"""Numbers of state that a program of `_carry` has."""

SCRATCH = 2**26
"""States that the backward pass writes down at once: 256 MB."""

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""Of the inputs."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET was set at import: the kernels run as numpy, on a CPU."""

EXACT = "interpreted" if INTERPRETED else "ieee"
"""As gam_lm.ops.triton_tiles takes it."""

LOG2_E = tl.constexpr(math.log2(math.e))


@torch.library.custom_op("gam_lm::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence.

    Args:
        x: (B, T, E) in one of `FORMATS`.
        dt: step sizes ≥ 0, likewise.
        A: decay rates ≤ 0 (N, E) in fp32.
        B: what a token writes to (B, T, N), as C, what it reads.
        first: the states (B, N, E) in fp32 before the rows, or None.
        index: the sequences of each row (gam_lm.ops.segments.Segments.index_BT), or None for one.

    Returns:
        y (B, T, E) and the state (B, N, E) after the rows, both in fp32.
    """
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors lie on
        call = _Call(x, dt, A, B, C, first, index)
        y = _buffer(x.shape, x)
        starts, _, last = call.starts()
        _forward[call.grid](*call.inputs, call.index, starts, y, *call.sizes, **call.options)
    return y, last


@selective_scan.register_fake
def _shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((len(x), *A.shape), dtype=torch.float32)


@torch.library.custom_op("gam_lm::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None, index: Tensor | None, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return _Call(x, dt, A, B, C, first, index).backward(dy.contiguous(), dlast.contiguous())


@_selective_scan_backward.register_fake
def _shapes_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    return (*(each.new_empty(each.shape) for each in tensors[:5]), tensors[8].new_empty(tensors[8].shape))


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dfirst = _selective_scan_backward(*ctx.saved_tensors, dy, dlast)
    return *gradients, None if ctx.saved_tensors[5] is None else dfirst, None


selective_scan.register_autograd(_gradient, setup_context=_save)


def _buffer(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that the kernels fill."""
    return torch.empty(shape, dtype=dtype, device=like.device)


class _Call:
    """The arguments of the kernels for one call."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor | None, index: Tensor | None) -> None:
        rows, T, E = x.shape
        N, J = len(A), triton.cdiv(T, CHUNK)
        self.inputs = [each.contiguous() for each in (x, dt, A, B, C)]
        self.first = None if first is None else first.contiguous()
        self.index = A if index is None else index.contiguous()  # of no influence, where none is given
        self.sizes = T, J, N, E
        self.blocks = triton.cdiv(E, CHANNELS)
        self.grid = (rows * J, self.blocks)
        self.state_shape, self.chunk_shape = (rows, N, E), (rows * J, N, E)
        self.options: dict[str, Any] = {"L": CHUNK, "P": triton.next_power_of_2(N), "S": CHANNELS, "PACKED": index is not None, "num_warps": WARPS}

    def starts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The state before each chunk, what each chunk leaves of it, and the state after the rows."""
        x, dt, A, B, _ = self.inputs
        added, decay = _buffer(self.chunk_shape, x), _buffer(self.chunk_shape, x)
        _summaries[self.grid](x, dt, A, B, self.index, added, decay, *self.sizes, BACK=False, **self.options)
        return added, decay, self._carried(added, decay, self.first, back=False)

    def _carried(self, added: Tensor, decay: Tensor, first: Tensor | None, *, back: bool) -> Tensor:
        """Put the carry into each chunk in the place of what the chunk adds; what comes out of the last one is returned."""
        _, J, N, E = self.sizes
        last = _buffer(self.state_shape, added)
        grid = (len(last), triton.cdiv(N * E, CARRIED))
        _carry[grid](added, decay, last if first is None else first, last, J, N * E, W=CARRIED, GIVEN=first is not None, BACK=back, num_warps=1)
        return last

    def backward(self, dy: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of all inputs and of the first state."""
        x, dt, A, B, C = self.inputs
        _, _, N, E = self.sizes
        starts, decay, _ = self.starts()
        ends = _buffer(self.chunk_shape, x)
        _summaries[self.grid](dy, dt, A, C, self.index, ends, ends, *self.sizes, BACK=True, **self.options)
        dfirst = self._carried(ends, decay, dlast, back=True)
        dx, ddt = _buffer(x.shape, x, x.dtype), _buffer(dt.shape, dt, dt.dtype)
        dB, dC = (_buffer((self.blocks, *each.shape), each) for each in (B, C))  # a part for each block of channels
        chunks = max(1, min(self.grid[0], SCRATCH // (CHUNK * N * E)))
        states = _buffer((chunks, CHUNK, N, E), x)
        for begin in range(0, self.grid[0], chunks):
            grid = (min(chunks, self.grid[0] - begin), self.blocks)
            _backward[grid](*self.inputs, self.index, dy, starts, ends, states, dx, ddt, dB, dC, begin, B.numel(), *self.sizes, EXACT=EXACT, **self.options)
        return dx, ddt, ends.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dfirst  # `_backward` left dA where it found the ends


@triton.jit
def _number(at, mask):
    """What stands there in fp32, 0 outside."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decay(dt_S, rate_PS, index, row, t, T, PACKED: tl.constexpr):
    """exp(dt A), 0 at the start of a sequence."""
    a_PS = tl.exp2(dt_S[None, :] * rate_PS)
    if PACKED:
        before = tl.load(index + row * T + t - 1, mask=t > 0, other=0)
        a_PS = tl.where(tl.load(index + row * T + t) == before, a_PS, 0.0)
    return a_PS


@triton.jit
def _summaries(
    weight, dt, A, pick, index, added, decay, T, J, N, E,
    L: tl.constexpr, P: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """From the first token to the last Σ (decay after t) dt_t x_t ⊗ B_t and the decay over the chunk; back Σ (decay up to t) dy_t ⊗ C_t alone."""
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = chunk // J, (chunk % J) * L
    n_P, e_S = tl.arange(0, P), tl.program_id(1) * S + tl.arange(0, S)
    in_P, in_S = n_P < N, e_S < E
    at_PS, in_PS = chunk * N * E + n_P[:, None] * E + e_S[None, :], in_P[:, None] & in_S[None, :]
    rate_PS = LOG2_E * _number(A + n_P[:, None] * E + e_S[None, :], in_PS)
    h_PS, sum_S = tl.zeros((P, S), tl.float32), tl.zeros((S,), tl.float32)
    count = tl.minimum(T - begin, L)
    for i in range(count):
        t = begin + i
        if BACK:
            t = begin + count - 1 - i
        token = row * T + t
        dt_S, w_S, b_P = _number(dt + token * E + e_S, in_S), _number(weight + token * E + e_S, in_S), _number(pick + token * N + n_P, in_P)
        a_PS = _decay(dt_S, rate_PS, index, row, t, T, PACKED)
        if BACK:
            h_PS = a_PS * (h_PS + b_P[:, None] * w_S[None, :])
        else:
            h_PS = a_PS * h_PS + b_P[:, None] * (dt_S * w_S)[None, :]
            sum_S += dt_S
    tl.store(added + at_PS, h_PS, mask=in_PS)
    if not BACK:
        left_PS = tl.exp2(sum_S[None, :] * rate_PS)
        if PACKED:
            before = tl.load(index + row * T + begin - 1, mask=begin > 0, other=0)
            left_PS = tl.where(tl.load(index + row * T + begin + count - 1) == before, left_PS, 0.0)
        tl.store(decay + at_PS, left_PS, mask=in_PS)


@triton.jit
def _carry(added, decay, first, last, J, X, W: tl.constexpr, GIVEN: tl.constexpr, BACK: tl.constexpr):
    """s ← decay_j s + added_j over the chunks of a row, whose places of ``added`` get s as it was before."""
    row, x_W = tl.program_id(0).to(tl.int64), tl.program_id(1) * W + tl.arange(0, W)
    in_W = x_W < X
    s_W = tl.zeros((W,), tl.float32)
    if GIVEN:
        s_W = _number(first + row * X + x_W, in_W)
    for i in tl.range(J, num_stages=4):  # loads run ahead: they wait for nothing
        j = i
        if BACK:
            j = J - 1 - i
        at_W = (row * J + j) * X + x_W
        added_W, decay_W = _number(added + at_W, in_W), _number(decay + at_W, in_W)
        tl.store(added + at_W, s_W, mask=in_W)
        s_W = decay_W * s_W + added_W
    tl.store(last + row * X + x_W, s_W, mask=in_W)


@triton.jit
def _forward(
    x, dt, A, B, C, index, starts, y, T, J, N, E,
    L: tl.constexpr, P: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = chunk // J, (chunk % J) * L
    n_P, e_S = tl.arange(0, P), tl.program_id(1) * S + tl.arange(0, S)
    in_P, in_S = n_P < N, e_S < E
    in_PS = in_P[:, None] & in_S[None, :]
    rate_PS = LOG2_E * _number(A + n_P[:, None] * E + e_S[None, :], in_PS)
    h_PS = _number(starts + chunk * N * E + n_P[:, None] * E + e_S[None, :], in_PS)
    for i in range(tl.minimum(T - begin, L)):
        token = row * T + begin + i
        dt_S, x_S = _number(dt + token * E + e_S, in_S), _number(x + token * E + e_S, in_S)
        b_P, c_P = _number(B + token * N + n_P, in_P), _number(C + token * N + n_P, in_P)
        h_PS = _decay(dt_S, rate_PS, index, row, begin + i, T, PACKED) * h_PS + b_P[:, None] * (dt_S * x_S)[None, :]
        tl.store(y + token * E + e_S, tl.sum(c_P[:, None] * h_PS, 0), mask=in_S)


@triton.jit(do_not_specialize=["begin_chunk"])
def _backward(
    x, dt, A, B, C, index, dy, starts, ends, states, dx, ddt, dB, dC, begin_chunk, part, T, J, N, E,
    L: tl.constexpr, P: tl.constexpr, S: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    chunk = begin_chunk + tl.program_id(0).to(tl.int64)
    row, begin = chunk // J, (chunk % J) * L
    n_P, e_S = tl.arange(0, P), tl.program_id(1) * S + tl.arange(0, S)
    in_P, in_S = n_P < N, e_S < E
    at_PS, in_PS = n_P[:, None] * E + e_S[None, :], in_P[:, None] & in_S[None, :]
    own = tl.program_id(1).to(tl.int64) * part
    A_PS = _number(A + at_PS, in_PS)
    rate_PS = LOG2_E * A_PS
    held = states + tl.program_id(0).to(tl.int64) * L * N * E + at_PS
    count = tl.minimum(T - begin, L)
    h_PS = _number(starts + chunk * N * E + at_PS, in_PS)
    for i in range(count):
        token = row * T + begin + i
        tl.store(held + i * N * E, h_PS, mask=in_PS)
        dt_S, x_S, b_P = _number(dt + token * E + e_S, in_S), _number(x + token * E + e_S, in_S), _number(B + token * N + n_P, in_P)
        h_PS = _decay(dt_S, rate_PS, index, row, begin + i, T, PACKED) * h_PS + b_P[:, None] * (dt_S * x_S)[None, :]
    tl.debug_barrier()
    g_PS, dA_PS = _number(ends + chunk * N * E + at_PS, in_PS), tl.zeros((P, S), tl.float32)
    for back in range(count):
        i = count - 1 - back
        token = row * T + begin + i
        dt_S, x_S, dy_S = _number(dt + token * E + e_S, in_S), _number(x + token * E + e_S, in_S), _number(dy + token * E + e_S, in_S)
        b_P, c_P = _number(B + token * N + n_P, in_P), _number(C + token * N + n_P, in_P)
        before_PS = _number(held + i * N * E, in_PS)
        # h is the state after the token, g the gradient of it once what y_t adds is in.
        tl.store(dC + own + token * N + n_P, tl.sum(h_PS * dy_S[None, :], 1), mask=in_P)
        g_PS += c_P[:, None] * dy_S[None, :]
        tl.store(dB + own + token * N + n_P, tl.sum(g_PS * (dt_S * x_S)[None, :], 1), mask=in_P)
        du_S = tl.sum(g_PS * b_P[:, None], 0)
        g_PS *= _decay(dt_S, rate_PS, index, row, begin + i, T, PACKED)
        q_PS = g_PS * before_PS  # the gradient of dt A
        dA_PS += q_PS * dt_S[None, :]
        tl.store(dx + token * E + e_S, rounded(du_S * dt_S, dx, EXACT), mask=in_S)
        tl.store(ddt + token * E + e_S, rounded(du_S * x_S + tl.sum(q_PS * A_PS, 0), ddt, EXACT), mask=in_S)
        h_PS = before_PS
    tl.store(ends + chunk * N * E + at_PS, dA_PS, mask=in_PS)
