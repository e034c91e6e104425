"""Who may use the model now: one thread reads prompts, one draws tokens, and they take turns that are short.

A piece of a prompt takes many times as long as a token. The thread that reads it therefore gives way between two blocks of the model, once it has had half as long as
a token takes: a token waits for one block or for half of its own time, not for a piece, so that a stream's gaps stay below twice their usual length; and the piece is
computed as it would have been alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SHARE = 0.5
"""Of a drawing turn's usual length: what a reader has before it gives way to one that waits."""


class Turns:
    """A lock that is handed on in the order of asking, and that a reader of prompts hands on between two of ``blocks``."""

    def __init__(self, blocks: nn.Module | None = None) -> None:
        self._guard = threading.Lock()
        self._queue: deque[threading.Event] = deque()
        self._held = False
        self._reader = threading.local()
        self._usual = 0.0  # seconds of a turn that draws, a moving average
        for block in blocks.children() if blocks is not None else ():
            block.register_forward_pre_hook(self._between_blocks)

    @contextmanager
    def turn(self, *, yielding: bool = False) -> Iterator[None]:
        """A turn of this thread, which is given away between two blocks where ``yielding``."""
        self._take()
        self._reader.yielding, self._reader.since = yielding, time.perf_counter()
        try:
            yield
        finally:
            if not yielding:
                self._usual += 0.2 * (time.perf_counter() - self._reader.since - self._usual)
            self._reader.yielding = False
            self._hand_on()

    def _take(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._queue.append(mine)
        mine.wait()

    def _hand_on(self) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().set()  # the lock stays held, by the next one
            else:
                self._held = False

    def _between_blocks(self, block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not getattr(self._reader, "yielding", False) or not self._queue:
            return
        if time.perf_counter() - self._reader.since < SHARE * self._usual:
            return
        if inputs[0].device.type == "cuda":
            torch.cuda.synchronize(inputs[0].device)  # what is queued on the device has its turn too
        self._hand_on()
        self._take()
        self._reader.since = time.perf_counter()
