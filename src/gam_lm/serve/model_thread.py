"""The one thread in which the model runs: it reads prompts, and between two blocks of the model it draws the tokens that others wait for.

A piece of a prompt takes many times as long as a token. Its reader therefore draws for those who wait between two blocks, once it has had half as long as a token
takes: a token waits for one block or for half of its own time, not for a piece, so that a stream's gaps stay below twice their usual length; and the piece is
computed as it would have been alone.

One thread, as every thread that computes gets helpers of its own from OpenMP. With more of them than cores, GNU's OpenMP puts a helper to sleep after each operation
instead of letting it wait for the next, which made a prompt take three times as long as in a program of one thread (docs/log.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio
import torch
from anyio.lowlevel import checkpoint
from torch import nn

T = TypeVar("T")

SHARE = 0.5
"""Of a drawing's usual length: what a reader has before it gives way to those who wait."""


class ModelThread:
    """Runs one call after another, in the order of asking.

    Args:
        blocks: of the model; between two of them a reader gives way.
        waiting: whether somebody waits for a token.
        draw: draws for those who wait.
        threads: cores that a call may use; None leaves torch's number.
    """

    def __init__(self, blocks: nn.Module, waiting: Callable[[], bool], draw: Callable[[], None], threads: int | None = None) -> None:
        start = (lambda: None) if threads is None else (lambda: torch.set_num_threads(threads))
        self._executor = ThreadPoolExecutor(1, "model", initializer=start)
        self._waiting, self._draw = waiting, draw
        self._reads = False
        self._since = 0.0
        self._usual = 0.0  # seconds of a drawing, a moving average
        for block in blocks.children():
            block.register_forward_pre_hook(self._between_blocks)

    async def read(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, which gives way between two blocks. A cancelled caller waits until it has ended."""
        await checkpoint()
        with anyio.CancelScope(shield=True):
            found = await asyncio.wrap_future(self._executor.submit(self._reading, work))
        return found

    def draw_soon(self) -> None:
        """Draw when the calls before are done; whoever has had a token by then is not asked again."""
        self._executor.submit(self._drawing)

    def _reading(self, work: Callable[[], T]) -> T:
        self._reads, self._since = True, time.perf_counter()
        try:
            return work()
        finally:
            self._reads = False

    def _drawing(self) -> None:
        if self._waiting():
            started = time.perf_counter()
            self._draw()
            self._usual += 0.2 * (time.perf_counter() - started - self._usual)

    def _between_blocks(self, block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not self._reads or not self._waiting() or time.perf_counter() - self._since < SHARE * self._usual:
            return
        if inputs[0].device.type == "cuda":
            torch.cuda.synchronize(inputs[0].device)  # what is queued on the device has its turn too
        self._reads = False  # a drawing does not give way
        self._drawing()
        self._reads, self._since = True, time.perf_counter()
