"""Mamba's selective scan on a CPU as an operator of PyTorch, with the loops that Numba compiles (gam_lm.ops.selective_scan_numba).

A program is the scan of one row and one block of channels. Programs run on as many threads as PyTorch has, and none adds to what another writes: any number of
threads gives the same bits. Numba itself is imported at the first call.

Shapes: B rows, T tokens, E channels, N states per channel, K stretches of tokens, P blocks of at most W channels.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gam_lm.ops.first_derivative import refuse_second_derivative
from gam_lm.ops.selective_scan import LOG2_E, STRETCH

CHANNELS = 128
"""W. With 16 states per channel the states and decays of a stretch take a quarter of a megabyte."""


@torch.library.custom_op("gam_lm::selective_scan_numba", mutates_args=(), device_types="cpu")
def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor, goes_on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over a sequence, all in fp32.

    Args:
        x: (B, T, E).
        dt: step sizes ≥ 0, likewise.
        A: decay rates ≤ 0 (N, E).
        B: what a token writes to (B, T, N), as C, what it reads.
        first: the states (B, N, E) before the rows.
        goes_on: (B, T), 0 where a token starts a sequence and 1 elsewhere.

    Returns:
        y (B, T, E), the state (B, N, E) after the rows, and the states (B, K, N, E) before every `STRETCH` tokens, for the backward pass.
    """
    (rows, T, E), N = x.shape, len(A)
    y, last, kept = (x.new_empty(shape) for shape in _sizes(rows, T, E, N))
    _run("forward", rows, E, x, dt, A * LOG2_E, B, C, goes_on, first, y, last, kept)
    return y, last, kept


@selective_scan.register_fake
def _shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor, goes_on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (rows, T, E), N = x.shape, len(A)
    y, last, kept = (x.new_empty(shape) for shape in _sizes(rows, T, E, N))
    return y, last, kept


@torch.library.custom_op("gam_lm::selective_scan_numba_backward", mutates_args=(), device_types="cpu")
def _selective_scan_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, goes_on: Tensor, kept: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, T, E), N = x.shape, len(A)
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    dA, dfirst = x.new_empty(rows, N, E), x.new_empty(rows, N, E)
    dB, dC = (x.new_empty(rows, _blocks(E), T, N) for _ in range(2))
    _run("backward", rows, E, x, dt, A, A * LOG2_E, B, C, goes_on, kept, dy, dlast, dx, ddt, dA, dB, dC, dfirst)
    return dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dfirst


@_selective_scan_backward.register_fake
def _shapes_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    return (*(each.new_empty(each.shape) for each in tensors[:5]), tensors[8].new_empty(tensors[8].shape))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, A, B, C, _, goes_on = inputs
    ctx.save_for_backward(x, dt, A, B, C, goes_on, output[2])


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("the selective scan", "differentiate gam_lm.ops.selective_scan.naive_selective_scan")
    return *_selective_scan_backward(*ctx.saved_tensors, dy, dlast), None


selective_scan.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.gam_lm.selective_scan_numba)
def _operations(x: tuple[int, int, int], dt: tuple[int, int, int], A: tuple[int, int], *_: Any, **__: Any) -> int:
    """Three multiply-adds for a number of the state: dt·A, the recurrence, C · h."""
    return 6 * math.prod(x) * A[0]


@register_flop_formula(torch.ops.gam_lm.selective_scan_numba_backward)
def _operations_backward(x: tuple[int, int, int], dt: tuple[int, int, int], A: tuple[int, int], *_: Any, **__: Any) -> int:
    """Two for each of the forward pass; that the states are found once more is not counted."""
    return 12 * math.prod(x) * A[0]


def _sizes(rows: int, T: int, E: int, N: int) -> tuple[tuple[int, ...], ...]:
    """Of y, of the last state, of the states that are kept."""
    return (rows, T, E), (rows, N, E), (rows, (T + STRETCH - 1) // STRETCH, N, E)


def _blocks(E: int) -> int:
    """P."""
    return (E + CHANNELS - 1) // CHANNELS


def _run(name: str, rows: int, E: int, *tensors: Tensor) -> None:
    """All programs of a kernel."""
    from gam_lm.ops import selective_scan_numba

    kernel, arrays = getattr(selective_scan_numba, name), [each.detach().contiguous().numpy() for each in tensors]
    programs = range(rows * _blocks(E))
    left = iter(programs)

    def work() -> None:
        for program in left:
            kernel(*arrays, program, CHANNELS)

    others = [_threads().submit(work) for _ in range(min(torch.get_num_threads(), len(programs)) - 1)]
    work()
    for each in others:
        each.result()  # an error in a thread is raised here


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads that stay, for one that is new starts late on a machine where OpenMP's wait for work by spinning."""
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
