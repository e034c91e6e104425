"""An exponential average of the weights over the last steps of a run, which is often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gam_lm.training.sharding import local


class Average:
    """The average Σ dᵗ⁻ⁱ wᵢ / Σ dᵗ⁻ⁱ of the weights after the steps i = 1 … t: free of the initial weights, however short the run.

    Args:
        model: whose parameters are averaged; buffers are not.
        decay: d in (0, 1); the average reaches back some 1 / (1 − d) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = dict(model.named_parameters())  # each shared weight once
        self.tensors: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 1, 2, …, each of which is given once."""
        new = (1 - self._decay) / (1 - self._decay**step)
        torch._foreach_lerp_([local(each) for each in self.tensors.values()], [local(each) for each in self._weights.values()], new)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average for a while, and its own weights back, bit by bit."""
        own = {name: local(weight).detach().clone() for name, weight in self._weights.items()}
        self.hand_over()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    local(weight).copy_(own[name])

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the model the average for good."""
        for name, weight in self._weights.items():
            local(weight).copy_(local(self.tensors[name]))
