"""Mamba's selective scan on a CPU, compiled by Numba: one program a row and block of channels, with the state of the block in the core's cache.

    h_t = exp(dt_t A) ∘ h_{t−1} + dt_t x_t ⊗ B_t            y_t = C_t · h_t

The recurrence as it stands, a token at a time. The loop over channels is innermost, so that it becomes vector instructions; what plain PyTorch does in a pass over
memory for each operation happens between one load and one store. The forward pass keeps the state before every `STRETCH` tokens; the backward pass walks over the
stretches from the last, finds the states of each again, and goes back over them. No program adds to what another writes. gam_lm.ops.selective_scan_cpu runs them.

Arithmetic is fp32. Shapes: B rows, T tokens, E channels, N states per channel, K stretches, P blocks of at most W channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from gam_lm.ops.selective_scan import STRETCH

LEAST_EXPONENT, HALF, ONE = np.float32(-126), np.float32(0.5), np.float32(1)
P1, P2, P3, P4, P5, P6 = np.array([6.93147182e-1, 2.40226477e-1, 5.55033237e-2, 9.61843692e-3, 1.33988750e-3, 1.53533620e-4], np.float32)
"""2^f ≈ 1 + P1 f + … + P6 f⁶ for |f| ≤ ½, with the least largest relative error (2e-9, below fp32's rounding)."""


FREEDOMS = {"reassoc", "contract", "nsz"}
"""Of the compiler: a sum may be taken in any order, as vector instructions need it, but NaN stays NaN."""


def _jit(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, and run without the interpreter's lock."""
    try:
        return numba.njit(function, nogil=True, fastmath=FREEDOMS, cache=True)  # the cache saves the next process some seconds
    except RuntimeError:  # there is no folder to write to
        return numba.njit(function, nogil=True, fastmath=FREEDOMS)


@numba.njit(fastmath=FREEDOMS, inline="always")
def _power_of_2(x):
    """2^x for x ≤ 0, at least 2⁻¹²⁶: the whole part of x is put into the exponent's bits, the rest goes through a polynomial."""
    x = max(x, LEAST_EXPONENT)
    whole = np.floor(x + HALF)
    f = x - whole
    bits = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return ((((((P6 * f + P5) * f + P4) * f + P3) * f + P2) * f + P1) * f + ONE) * bits.view(np.float32)


@_jit
def forward(x, dt, rate, B, C, goes_on, first, y, last, kept, program, W):
    """Writes y (B, T, E), last (B, N, E) and kept (B, K, N, E). ``rate`` is A·log₂e; ``goes_on`` (B, T) is 0 where a sequence starts, else 1."""
    T, E, N = x.shape[1], x.shape[2], len(rate)
    blocks = (E + W - 1) // W
    b, lo = program // blocks, program % blocks * W
    S = min(W, E - lo)
    h, a = np.empty((N, S), np.float32), np.empty((N, S), np.float32)
    u, sums = np.empty(S, np.float32), np.empty(S, np.float32)
    for n in range(N):
        for s in range(S):
            h[n, s], a[n, s] = first[b, n, lo + s], rate[n, lo + s]
    for t in range(T):
        if t % STRETCH == 0:
            for n in range(N):
                for s in range(S):
                    kept[b, t // STRETCH, n, lo + s] = h[n, s]
        d, x_t, on = dt[b, t, lo : lo + S], x[b, t, lo : lo + S], goes_on[b, t]
        for s in range(S):
            u[s] = d[s] * x_t[s]
            sums[s] = 0
        for n in range(N):
            b_n, c_n = B[b, t, n], C[b, t, n]
            for s in range(S):
                state = on * _power_of_2(d[s] * a[n, s]) * h[n, s] + b_n * u[s]
                h[n, s] = state
                sums[s] += c_n * state
        for s in range(S):
            y[b, t, lo + s] = sums[s]
    for n in range(N):
        for s in range(S):
            last[b, n, lo + s] = h[n, s]


@_jit
def backward(x, dt, A, rate, B, C, goes_on, kept, dy, dlast, dx, ddt, dA, dB, dC, dfirst, program, W):
    """Writes dx, ddt (B, T, E), dA, dfirst (B, N, E), and dB, dC (B, P, T, N), which are yet to be added up over the blocks, as dA over the rows."""
    T, E, N = x.shape[1], x.shape[2], len(rate)
    blocks = (E + W - 1) // W
    b, block = program // blocks, program % blocks
    lo = block * W
    S = min(W, E - lo)
    h = np.empty((STRETCH + 1, N, S), np.float32)  # the state before each token of a stretch, and after its last
    decay = np.empty((STRETCH, N, S), np.float32)
    u, du, slope = np.empty((STRETCH, S), np.float32), np.empty(S, np.float32), np.empty(S, np.float32)
    g, g_A = np.empty((N, S), np.float32), np.zeros((N, S), np.float32)
    for n in range(N):
        for s in range(S):
            g[n, s] = dlast[b, n, lo + s]
    for k in range((T - 1) // STRETCH, -1, -1):
        start = k * STRETCH
        tokens = min(STRETCH, T - start)
        for n in range(N):
            for s in range(S):
                h[0, n, s] = kept[b, k, n, lo + s]
        for i in range(tokens):
            t = start + i
            d, x_t, u_t, on = dt[b, t, lo : lo + S], x[b, t, lo : lo + S], u[i], goes_on[b, t]
            for s in range(S):
                u_t[s] = d[s] * x_t[s]
            for n in range(N):
                before, after, kept_share, a_n, b_n = h[i, n], h[i + 1, n], decay[i, n], rate[n, lo : lo + S], B[b, t, n]
                for s in range(S):
                    share = on * _power_of_2(d[s] * a_n[s])
                    kept_share[s] = share
                    after[s] = share * before[s] + b_n * u_t[s]
        for i in range(tokens - 1, -1, -1):
            t = start + i
            d, x_t, dy_t, u_t = dt[b, t, lo : lo + S], x[b, t, lo : lo + S], dy[b, t, lo : lo + S], u[i]
            for s in range(S):
                du[s] = slope[s] = 0
            for n in range(N):
                before, after, kept_share, g_n, g_A_n, A_n = h[i, n], h[i + 1, n], decay[i, n], g[n], g_A[n], A[n, lo : lo + S]
                b_n, c_n = B[b, t, n], C[b, t, n]
                sum_B, sum_C = np.float32(0), np.float32(0)
                for s in range(S):
                    sum_C += after[s] * dy_t[s]
                    reached = g_n[s] + c_n * dy_t[s]  # dL/dh_t, of which g had what does not come from y_t
                    du[s] += b_n * reached
                    sum_B += u_t[s] * reached
                    reached *= kept_share[s]
                    g_n[s] = reached
                    exponent = reached * before[s]  # dL/d(dt A)
                    g_A_n[s] += exponent * d[s]
                    slope[s] += exponent * A_n[s]
                dB[b, block, t, n], dC[b, block, t, n] = sum_B, sum_C
            for s in range(S):
                dx[b, t, lo + s] = du[s] * d[s]
                ddt[b, t, lo + s] = slope[s] + du[s] * x_t[s]
    for n in range(N):
        for s in range(S):
            dA[b, n, lo + s], dfirst[b, n, lo + s] = g_A[n, s], g[n, s]
