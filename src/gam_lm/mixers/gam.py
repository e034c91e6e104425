"""Gated Associative Memory (arXiv 2509.00605, section 3): a local and a global path side by side, gated per token.

    local_t  = Σ_k w_k ∘ h_{t−K+1+k} + bias          causal depthwise convolution
    global_t = softmax(h_t Mᵀ) M                      retrieval from a memory of learned slots
    y_t      = σ(W_l h_t) ∘ local_t + σ(W_g h_t) ∘ global_t

The paper's memory is static, so that the global path moves nothing between tokens: one layer sees K tokens.

Shapes: B rows, T tokens, D = hidden_size, K taps, M slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.conv import CausalConv
from gam_lm.memory import retrieve
from gam_lm.mixers.base import Cost, Mixer, MixerState, init_linear
from gam_lm.segments import read_segments


class StaticMemory(nn.Module):
    """The paper's memory: one learned bank, which is both keys and values."""

    def __init__(self, num_slots: int, hidden_size: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.empty(num_slots, hidden_size))

    def init_weights(self) -> None:
        """Xavier-uniform, as published."""
        nn.init.xavier_uniform_(self.bank)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """softmax(h Mᵀ) M for every token."""
        return retrieve(h_BTD, self.bank)


class GatedAssociativeMemory(Mixer):
    """The token mixer of GAM.

    State: the last K − 1 inputs of the convolution, (B, K − 1, D): 4·(K − 1)·D bytes a sequence in fp32.
    """

    uses = frozenset({"conv_kernel_size", "num_memory_slots", "fusion", "write"})

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.conv = CausalConv(D, config.conv_kernel_size) if config.fusion != "global" else None
        self.memory = StaticMemory(config.num_memory_slots, D) if config.fusion != "local" else None
        self.gate = nn.Linear(D, 2 * D) if config.fusion == "gate" else None

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See :meth:`Mixer.forward`."""
        local_BTD, global_BTD = None, None
        if self.conv is not None:
            segments = None if segments_BT is None else read_segments(segments_BT)
            local_BTD, conv_state = self.conv(x_BTD, state[0] if state else None, segments)
            state = (conv_state,)
        if self.memory is not None:
            global_BTD = self.memory(x_BTD)
        return self._fuse(x_BTD, local_BTD, global_BTD), state or ()

    def _fuse(self, x_BTD: Tensor, local_BTD: Tensor | None, global_BTD: Tensor | None) -> Tensor:
        if local_BTD is None or global_BTD is None:
            alone_BTD = local_BTD if global_BTD is None else global_BTD
            assert alone_BTD is not None  # fusion leaves at least one path
            return alone_BTD
        if self.gate is None:
            return local_BTD + global_BTD
        local_gate_BTD, global_gate_BTD = self.gate(x_BTD).sigmoid().chunk(2, dim=-1)
        return local_gate_BTD * local_BTD + global_gate_BTD * global_BTD

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """Zeros: nothing came before."""
        if self.conv is None:
            return ()
        return (torch.zeros(batch_size, self.config.conv_kernel_size - 1, self.config.hidden_size, device=device, dtype=dtype),)

    def init_weights(self) -> None:
        """Convolution and bank as published; the gate by ``config.initialization``."""
        for part in (self.conv, self.memory):
            if part is not None:
                part.init_weights()
        if self.gate is not None:
            if self.config.initialization == "paper":
                self.gate.reset_parameters()
            else:
                init_linear(self.gate)

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Constant per token at every context."""
        D, K, M = config.hidden_size, config.conv_kernel_size, config.num_memory_slots
        has_conv, has_memory, has_gate = config.fusion != "global", config.fusion != "local", config.fusion == "gate"
        flops = 2 * has_conv * D * K + 4 * has_memory * M * D + 4 * has_gate * D * D
        return Cost(
            parameters=has_conv * D * (K + 1) + has_memory * M * D + has_gate * (2 * D * D + 2 * D),
            forward_flops=flops,
            decode_flops=flops,
            activations=D + has_conv * D + has_memory * (M + D) + 2 * has_gate * D,
            state_bytes=4 * has_conv * (K - 1) * D,
        )

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """The taps of the convolution: the static memory is read by each token alone."""
        return 1 if config.fusion == "global" else config.conv_kernel_size
