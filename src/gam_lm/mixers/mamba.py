"""Mamba, the other baseline (Gu & Dao, arXiv 2312.00752, section 3.4 and figure 3): a selective state space behind a short convolution, gated.

    x, z       = split(W_in h)                              two branches of E = expand · D channels
    x          = SiLU(causal_conv(x))
    dt, B, C   = split(W_x x);  dt = softplus(W_dt dt + bias)     step size, input and output maps from the token itself: the selection
    s_t        = exp(dt A) ∘ s_{t−1} + dt x ⊗ B             A = −exp(A_log) < 0
    y_t        = W_out ((C · s_t + D_skip ∘ x) ∘ SiLU(z))

Shapes: B rows, T tokens, D = hidden_size, E inner channels, N = state_size, R rank of the step size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import MOST_LOG_RATE, Cost, Mixer, MixerState, init_linear, residual_branches, step_bias
from gam_lm.mixers.convolution import CausalConv
from gam_lm.mixers.mamba_options import MambaOptions
from gam_lm.ops.segments import read_segments
from gam_lm.ops.selective_scan import STRETCH, chunk_length, recomputed_places
from gam_lm.ops.selective_scan_kernels import automatic_backend, scan_by


def step_rank(config: ModelConfig) -> int:
    """R = D / 16, rounded up: the rank of the map to step sizes."""
    return math.ceil(config.hidden_size / 16)


def inner_size(config: ModelConfig) -> int:
    """E: the channels of the state space."""
    return round(config.options_of(MambaOptions).expand * config.hidden_size)


class Mamba(Mixer):
    """The token mixer of Mamba, with the scan in plain PyTorch or by the library's own kernels.

    State: the last K − 1 inputs of the convolution (B, K − 1, E) and the state space (B, N, E), together 4·E·(K − 1 + N) bytes a sequence in fp32.
    """

    options_type = MambaOptions
    backends = ("torch", "triton", "numba")
    options: MambaOptions

    def compiles(self, context: int) -> bool:
        """Never: a compiler takes minutes over the scan's loops in plain PyTorch, brought no time beside Numba's (docs/log.md), and with Triton's nobody has tried."""
        return False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, E, N, R = config.hidden_size, inner_size(config), self.options.state_size, step_rank(config)
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv = CausalConv(E, self.options.conv_kernel_size)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(N, E))
        self.A_log.no_weight_decay = True  # type: ignore[attr-defined]  # as in the official code: its decay would move all rates towards 1
        self.skip = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, D, bias=False)

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See `Mixer.forward`."""
        segments = None if segments_BT is None or not segments_BT.numel() else read_segments(segments_BT)
        conv_state, scan_state = state if state else (None, None)
        x_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTE, conv_state = self.conv(x_BTE, conv_state, segments)
        x_BTE = F.silu(x_BTE)
        N = self.options.state_size
        dt_BTR, B_BTN, C_BTN = self.x_proj(x_BTE).split([step_rank(self.config), N, N], dim=-1)
        dt_BTE = F.softplus(self.dt_proj(dt_BTR))
        index_BT = None
        if segments is not None:
            dt_BTE = dt_BTE * segments.real_BT[..., None]  # a step of size 0 changes nothing
            index_BT = segments.index_BT
        widest = torch.promote_types(x_BTE.dtype, self.A_log.dtype)
        y_BTE, scan_state = scan_by(self.options.backend, x_BTE.device.type, N, widest)(
            x_BTE, dt_BTE, -self.A_log.clamp(max=MOST_LOG_RATE).exp(), B_BTN, C_BTN, scan_state, chunk_size=self.options.chunk_size, index_BT=index_BT
        )
        y_BTE = (y_BTE + self.skip * x_BTE).to(x_BTE.dtype) * F.silu(z_BTE)
        return self.out_proj(y_BTE), (conv_state, scan_state)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """Zeros: nothing came before."""
        dtype = dtype or torch.get_default_dtype()
        E = inner_size(self.config)
        conv_state = torch.zeros(batch_size, self.options.conv_kernel_size - 1, E, device=device, dtype=dtype)
        scan_dtype = torch.promote_types(dtype, torch.float32)
        return conv_state, torch.zeros(batch_size, self.options.state_size, E, device=device, dtype=scan_dtype)

    def init_weights(self) -> None:
        """Rates 1 … N and log-uniform step sizes, as published; the projections by ``config.initialization``."""
        self.conv.init_weights()
        with torch.no_grad():
            rates_N = torch.arange(1, self.options.state_size + 1, device=self.A_log.device, dtype=self.A_log.dtype)
            self.A_log.copy_(rates_N.log()[:, None].expand_as(self.A_log))
            self.skip.fill_(1.0)
            bound = step_rank(self.config) ** -0.5
            self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(step_bias(self.dt_proj.bias))
        for linear in (self.in_proj, self.x_proj):
            init_linear(linear, self.config)
        init_linear(self.out_proj, self.config, residual=residual_branches(self.config, self.options))

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`; the small maps to step sizes and states are left out."""
        E = inner_size(self.config)
        yield self.in_proj.weight, (E, E)
        yield self.out_proj.weight, (self.config.hidden_size,)

    @classmethod
    def automatic_backend(cls, config: ModelConfig, device_type: str) -> str:
        """See `Mixer.automatic_backend`."""
        return automatic_backend(device_type, config.options_of(MambaOptions).state_size, torch.get_default_dtype())

    @classmethod
    def rule(cls, config: ModelConfig) -> str:
        """See `Mixer.rule`."""
        return "selective scan"

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Constant per token at every context; the scan counts as its multiply-adds. Activations are those of one row on a CPU."""
        options = config.options_of(MambaOptions)
        D, E, N, R, K = config.hidden_size, inner_size(config), options.state_size, step_rank(config), options.conv_kernel_size
        projections = 2 * D * E + E * (R + 2 * N) + R * E + E * D
        flops = 2 * (projections + K * E + 3 * N * E)
        if cls.backend_name(config, "cpu") == "numba":
            kept = N * E / STRETCH
        else:  # dt·x, and states at every few places of a chunk
            L = chunk_length(1, context, N * E, options.chunk_size, "cpu")
            kept = E + math.ceil(L / recomputed_places(L, math.ceil(context / L) * N * E)) * N * E / L
        return Cost(
            parameters=projections + E * (K + 1) + E + N * E + E,
            forward_flops=flops,
            decode_flops=flops,
            activations=10 * E + R + 2 * N + D + kept,
            state_bytes=4 * E * (K - 1 + N),
        )

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """Everything before, as far as the decay lets it through."""
        return None
