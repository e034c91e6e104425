"""Time in chunks: how a sequence is cut for the write rules, and how long what was written lasts.

Within a chunk of L tokens everything is a matrix product under the mask exp(G_i − G_j), i ≥ j, where G is the running sum of log λ, so that no exponent is
ever positive; from chunk to chunk a state is carried.

Shapes: B rows, T tokens, H heads, X anything, J chunks of L tokens, N = H·B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_LOG_DECAY = -100.0
"""exp of it is 0 beside anything in fp32 and fp64. Running sums of smaller ones lose the other tokens' decays, and −∞ − (−∞) is no number."""


CPU_CHUNK = 32
"""Most tokens of a chunk of the delta rule on a CPU: the passes over L × L matrices cost more there than more steps do (docs/log.md)."""


def chunk_tokens(chunk_size: int, device: torch.device) -> int:
    """Tokens of a chunk of the delta rule where ``chunk_size`` are asked for."""
    return min(chunk_size, CPU_CHUNK) if device.type == "cpu" else chunk_size


class Decays(NamedTuple):
    """How much of anything lasts from one place to another; 0 between different sequences."""

    mask_JNLL: Tensor
    """From token j of a chunk to token i ≥ j; 0 for i < j."""
    from_start_JNL1: Tensor
    """From before the chunk to a token."""
    to_end_JNL1: Tensor
    """From a token to the chunk's end."""
    keep_JN11: Tensor
    """From before the chunk to its end."""


class Chunks:
    """The layout in chunks of rows of T tokens with H heads.

    Args:
        B, T, H: rows, tokens, heads.
        chunk_size: tokens of a chunk; fewer where T is less.
        index_BT: number of sequence starts in the row so far (see gam_lm.ops.segments), or None for one sequence a row.
    """

    def __init__(self, B: int, T: int, H: int, chunk_size: int, index_BT: Tensor | None = None) -> None:
        self.B, self.T, self.H, self.L = B, T, H, min(chunk_size, T)
        self.missing = -T % self.L
        """Tokens that fill the last chunk: zeros, which write nothing and forget nothing."""
        self.index_JNL: Tensor | None = None
        if index_BT is not None:
            if self.missing:
                index_BT = torch.cat([index_BT, index_BT[:, -1:].expand(-1, self.missing)], 1)
            self.index_JNL = index_BT.unflatten(1, (-1, self.L)).transpose(0, 1).repeat(1, H, 1)

    def split(self, x_BTHX: Tensor) -> Tensor:
        """(B, T, H, X) to (J, N, L, X)."""
        if self.missing:
            x_BTHX = F.pad(x_BTHX, (0, 0, 0, 0, 0, self.missing))
        return x_BTHX.unflatten(1, (-1, self.L)).permute(1, 3, 0, 2, 4).flatten(1, 2)

    def join(self, x_JNLX: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x_JNLX.unflatten(1, (self.H, self.B)).permute(2, 0, 3, 1, 4).flatten(1, 2)[:, : self.T]

    def by_head(self, x_JNYX: Tensor, weight_HXZ: Tensor) -> Tensor:
        """Every head's rows times its own matrix."""
        J, _, Y, X = x_JNYX.shape
        return (x_JNYX.reshape(J, self.H, self.B * Y, X) @ weight_HXZ).view(J, self.H * self.B, Y, -1)

    def of_head(self, x_JNYX: Tensor) -> Tensor:
        """All rows of each head (H, J·B·Y, X)."""
        return x_JNYX.unflatten(1, (self.H, self.B)).transpose(0, 1).flatten(1, 3)

    def state(self, x_BHXX: Tensor) -> Tensor:
        """(B, H, …) to (N, …)."""
        return x_BHXX.transpose(0, 1).flatten(0, 1)

    def unstate(self, x_NXX: Tensor) -> Tensor:
        """The inverse of `state`."""
        # A copy in the layout that a single step leaves: for a compiled step another layout is another program.
        return x_NXX.unflatten(0, (self.H, self.B)).transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def heads(self, x_HX: Tensor) -> Tensor:
        """(H, X) to (N, X), the same in every row."""
        return x_HX[:, None].expand(-1, self.B, -1).flatten(0, 1)

    def decays(self, sum_JNL: Tensor) -> Decays:
        """What lasts, for the running sums G of log λ within each chunk."""
        # Clamped, not masked with −∞: the exponential of CPUs takes its slow path there, twenty times as long.
        mask_JNLL = (sum_JNL[..., :, None] - sum_JNL[..., None, :]).clamp(max=0).exp().tril()
        from_start_JNL, to_end_JNL, keep_JN = sum_JNL.exp(), (sum_JNL[..., -1:] - sum_JNL).exp(), sum_JNL[..., -1].exp()
        if self.index_JNL is not None:
            index_JNL = self.index_JNL
            before_JN1 = F.pad(index_JNL[:-1, :, -1:], (0, 0, 0, 0, 1, 0))  # the sequence that the chunk's first token would go on with
            end_JN1 = index_JNL[..., -1:]
            mask_JNLL = mask_JNLL * (index_JNL[..., :, None] == index_JNL[..., None, :])
            from_start_JNL = from_start_JNL * (index_JNL == before_JN1)
            to_end_JNL = to_end_JNL * (index_JNL == end_JN1)
            keep_JN = keep_JN * (before_JN1 == end_JN1)[..., 0]
        return Decays(mask_JNLL, from_start_JNL[..., None], to_end_JNL[..., None], keep_JN[..., None, None])
