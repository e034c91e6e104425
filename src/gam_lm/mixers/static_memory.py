"""The paper's memory: one learned bank, the same for every text.

Shapes: B rows, T tokens, D = hidden_size, M slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gam_lm.ops.retrieval import retrieve


class StaticMemory(nn.Module):
    """A bank that is both keys and values."""

    def __init__(self, num_slots: int, hidden_size: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.empty(num_slots, hidden_size))
        self.silent_M: Tensor | None = None
        """Slots that are taken out (see `Mixer.silence`)."""

    def init_weights(self) -> None:
        """Xavier-uniform, as published."""
        nn.init.xavier_uniform_(self.bank)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """softmax(h Mᵀ) M for every token."""
        if self.silent_M is not None:
            return retrieve(h_BTD, self.bank[~self.silent_M])
        return retrieve(h_BTD, self.bank)

    def shares(self, h_BTD: Tensor) -> Tensor:
        """softmax(h Mᵀ) (B, T, M)."""
        return (h_BTD @ self.bank.T).softmax(-1)
