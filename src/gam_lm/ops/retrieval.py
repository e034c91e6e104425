"""The paper's global path: softmax retrieval from a bank of learned slots.

    global_t = softmax(h_t Mᵀ) M

Shapes: B rows, T tokens, D = hidden_size, M slots.
"""

from __future__ import annotations

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
