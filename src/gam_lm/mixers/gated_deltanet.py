"""Gated DeltaNet as published (Yang, Kautz & Hatamizadeh, arXiv 2412.06464): the gated delta rule behind short convolutions.

    q, k, v  = SiLU(causal_conv(W_q h)), SiLU(causal_conv(W_k h)), SiLU(causal_conv(W_v h))          q, k of length 1 per head
    b_t      = σ(W_b h),   log λ_t = −exp(A) softplus(W_a h + dt)
    S_t      = λ_t S_{t−1} + b_t k_t (v_t − λ_t S_{t−1}ᵀ k_t)ᵀ                                        gam_lm.ops.delta_rule with V0 = 0
    y_t      = W_o (RMSNorm(S_tᵀ q_t / √M) ∘ SiLU(W_g h))                                             the norm per head

Shapes: B rows, T tokens, D = hidden_size, H heads, M channels of a head's key, E of its value, Q = H·M, V = H·E, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import MAX_UNROLLED, MOST_LOG_RATE, RATE_RANGE, Cost, Mixer, MixerState, init_linear, residual_branches, step_bias
from gam_lm.mixers.convolution import CausalConv
from gam_lm.mixers.gated_deltanet_options import GatedDeltaNetOptions
from gam_lm.ops.chunks import CPU_CHUNK, chunk_tokens
from gam_lm.ops.context_parallel import delta_over_pieces, number_segments
from gam_lm.ops.delta_rule_kernels import automatic_backend, delta_rule_by


def sizes(config: ModelConfig) -> tuple[int, int, int]:
    """H, Q and V."""
    options = config.options_of(GatedDeltaNetOptions)
    return options.num_heads or 1, round(options.expand_k * config.hidden_size), round(options.expand_v * config.hidden_size)


class GatedDeltaNet(Mixer):
    """The token mixer of Gated DeltaNet.

    State: the last K − 1 inputs of the convolutions (B, K − 1, 2·Q + V) and the memory (B, H, M, E) in fp32 or wider, together
    4·(K − 1)·(2·Q + V) + 4·Q·V/H bytes a sequence in fp32.
    """

    options_type = GatedDeltaNetOptions
    options: GatedDeltaNetOptions
    backends = ("torch", "fla", "triton")
    over_pieces = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.prefill_tokens = self.options.chunk_size  # type: ignore[misc]
        D, (H, Q, V) = config.hidden_size, sizes(config)
        self.num_heads, self.split_sizes = H, (Q, Q, V)
        self.qkv_proj = nn.Linear(D, 2 * Q + V, bias=False)
        self.conv = CausalConv(2 * Q + V, self.options.conv_kernel_size, bias=False)
        self.gate_proj = nn.Linear(D, V, bias=False)
        self.write_proj = nn.Linear(D, 2 * H, bias=False)
        self.log_rate = nn.Parameter(torch.empty(H))
        self.step_bias = nn.Parameter(torch.empty(H))
        self.norm = nn.Parameter(torch.empty(V // H))
        self.out_proj = nn.Linear(V, D, bias=False)

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See `Mixer.forward`."""
        segments = None if segments_BT is None or not segments_BT.numel() else number_segments(segments_BT)
        conv_state, memory = state if state else (None, None)
        qkv_BTX, conv_state = self.conv(self.qkv_proj(x_BTD), conv_state, segments)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)) for each in F.silu(qkv_BTX).split(self.split_sizes, -1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        write_BTX = self.write_proj(x_BTD)
        gate_BTH, step_BTH = write_BTX.to(torch.promote_types(write_BTX.dtype, torch.float32)).chunk(2, -1)
        gate_BTH = gate_BTH.sigmoid() * self.options.max_write
        log_decay_BTH = -self.log_rate.clamp(max=MOST_LOG_RATE).exp() * F.softplus(step_BTH + self.step_bias)
        index_BT = None
        if segments is not None:  # padding writes nothing and forgets nothing
            gate_BTH, log_decay_BTH = (each * segments.real_BT[..., None] for each in (gate_BTH, log_decay_BTH))
            index_BT = segments.index_BT
        M, E = q.shape[-1], v.shape[-1]
        rule = delta_rule_by(self.options.backend, q, v)
        bank_HME = v.new_zeros(self.num_heads, M, E)
        g_BTHE, (memory,) = delta_over_pieces(rule)(
            q / math.sqrt(M), k, v, gate_BTH, log_decay_BTH, bank_HME, None if memory is None else (memory,),
            chunk_size=self.options.chunk_size, index_BT=index_BT,
        )  # fmt: skip
        g_BTHE = F.rms_norm(g_BTHE, (E,), eps=self.config.layer_norm_eps) * self.norm
        return self.out_proj(g_BTHE.flatten(-2) * F.silu(self.gate_proj(x_BTD))), (conv_state, memory)

    @classmethod
    def automatic_backend(cls, config: ModelConfig, device_type: str) -> str:
        """See `Mixer.automatic_backend`."""
        H, Q, _ = sizes(config)
        return automatic_backend(device_type, Q // H, torch.get_default_dtype())

    def compiles(self, context: int) -> bool:
        """See `Mixer.compiles`."""
        device = self.out_proj.weight.device
        return self.backend_name(self.config, str(device)) == "triton" or context <= MAX_UNROLLED * chunk_tokens(self.options.chunk_size, device)

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`."""
        yield self.qkv_proj.weight, self.split_sizes
        yield self.gate_proj.weight, (len(self.gate_proj.weight),)
        yield self.out_proj.weight, (len(self.out_proj.weight),)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """Zeros: nothing came before."""
        dtype = dtype or torch.get_default_dtype()
        H, Q, V = sizes(self.config)
        conv_state = torch.zeros(batch_size, self.options.conv_kernel_size - 1, 2 * Q + V, device=device, dtype=dtype)
        return conv_state, torch.zeros(batch_size, H, Q // H, V // H, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def init_weights(self) -> None:
        """Decays as published, projections by ``config.initialization``."""
        self.conv.init_weights()
        for linear in (self.qkv_proj, self.gate_proj, self.write_proj):
            init_linear(linear, self.config)
        with torch.no_grad():
            self.log_rate.uniform_(*RATE_RANGE).log_()
            self.step_bias.copy_(step_bias(self.step_bias))
            self.norm.fill_(1.0)
        init_linear(self.out_proj, self.config, residual=residual_branches(self.config, self.options))

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Constant per token at every context."""
        options = config.options_of(GatedDeltaNetOptions)
        D, (H, Q, V), K = config.hidden_size, sizes(config), options.conv_kernel_size
        M, E, L = Q // H, V // H, min(options.chunk_size, CPU_CHUNK, context)
        projections = D * (2 * Q + V) + D * V + 2 * D * H + V * D
        flops = 2 * (projections + K * (2 * Q + V))
        inside = 2 * L * (2 * M + 2 * E) + L * L
        return Cost(
            parameters=projections + K * (2 * Q + V) + 2 * H + E,
            forward_flops=flops + H * (inside + 10 * M * E),
            decode_flops=flops + H * 6 * M * E,
            activations=D + 3 * (2 * Q + V) + 4 * Q + 8 * V + 9 * H + 3 * H * L + H * M * E / L,
            state_bytes=4 * (K - 1) * (2 * Q + V) + 4 * H * M * E,
        )

    @classmethod
    def rule(cls, config: ModelConfig) -> str:
        """See `Mixer.rule`."""
        return "delta rule"

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """Everything before, as far as the decay lets it through."""
        return None
