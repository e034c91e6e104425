"""The causal depthwise convolution as a module: the local path of GAM, and the short convolutions of other mixers.

Shapes: B rows, T tokens, C channels, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gam_lm.ops.causal_conv import causal_conv
from gam_lm.ops.context_parallel import inputs_before
from gam_lm.ops.segments import Segments


class CausalConv(nn.Module):
    """A causal depthwise convolution with its parameters."""

    def __init__(self, channels: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x_BTC: Tensor, state_BJC: Tensor | None = None, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        """See `causal_conv`."""
        state_BJC = inputs_before(x_BTC, self.weight.shape[1] - 1, state_BJC, segments)
        return causal_conv(x_BTC, self.weight, self.bias, state_BJC, segments)

    def init_weights(self) -> None:
        """PyTorch's initialisation of a depthwise Conv1d: U(±1/√K)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
