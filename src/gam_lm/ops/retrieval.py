"""The paper's global path: softmax retrieval from a bank of learned slots.

    global_t = softmax(h_t Mᵀ) M

Shapes: B rows, T tokens, D = hidden_size, M slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def retrieve(h_BTD: Tensor, memory_MD: Tensor) -> Tensor:
    """softmax(h Mᵀ) M: the paper's retrieval, in which the slots are both keys and values.

    Args:
        h_BTD: queries.
        memory_MD: the bank.

    Returns:
        A mixture of slots for each token (B, T, D).
    """
    return (h_BTD @ memory_MD.T).softmax(-1) @ memory_MD


def naive_retrieve(h_BTD: Tensor, memory_MD: Tensor) -> Tensor:
    """The same as a weighted mean of slots, token by token, for tests."""
    y_BTD = torch.zeros_like(h_BTD)
    for b in range(h_BTD.shape[0]):
        for t in range(h_BTD.shape[1]):
            weight_M = torch.stack([(h_BTD[b, t] @ slot_D).exp() for slot_D in memory_MD])
            y_BTD[b, t] = sum((w * slot_D for w, slot_D in zip(weight_M, memory_MD, strict=True)), torch.zeros_like(memory_MD[0])) / weight_M.sum()
    return y_BTD
