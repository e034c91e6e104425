"""Gated Associative Memory (arXiv 2509.00605, section 3): a local and a global path side by side, gated per token.

    local_t  = Σ_k w_k ∘ h_{t−K+1+k} + bias          causal depthwise convolution
    global_t = softmax(h_t Mᵀ) M                      retrieval from a memory of learned slots
    y_t      = σ(W_l h_t) ∘ local_t + σ(W_g h_t) ∘ global_t

The paper's memory is static, so that the global path moves nothing between tokens: one layer sees K tokens. With ``write="mean"`` or ``"delta"`` the
sequence edits what the slots hold. Per head, the learned rows K are the slots' addresses and V0 what they hold at first:

    u_t = a second causal convolution, at the start the previous token              r_t = softmax(τ RMSNorm(h_t) Kᵀ)     where to read
    v_t = W_v h_t,  b_t = σ(·),  log λ_t = −exp(A) softplus(·)                      a_t = softmax(τ RMSNorm(u_t) Kᵀ)     where to write
    y_t = σ(W_l h_t) ∘ local_t + W_o (σ(W_g h_t) ∘ RMSNorm(g_t))                    g_t: gam_lm.memory, from r, a, v, b, λ and V0

A value is written under the address of what came before it, so that a token reads what followed its like.

Shapes: B rows, T tokens, D = hidden_size, K taps, H heads, M slots (of a head, where there are heads), E = D / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.conv import CausalConv
from gam_lm.errors import InputError
from gam_lm.memory import delta_memory, fla_delta_memory, mean_memory, retrieve
from gam_lm.mixers.base import INIT_STD, Cost, Mixer, MixerState, init_linear
from gam_lm.segments import Segments, read_segments

SHARPNESS = 4.0
"""τ at the start: with addresses on the unit sphere, the standard deviation of a score."""

RATE_RANGE, STEP_RANGE = (1.0, 16.0), (1e-3, 0.1)
"""Decays at the start, as in Mamba-2 (arXiv 2405.21060): exp(A) uniform, softplus(·) log-uniform. A head forgets over 1 to 1,000 tokens."""


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


class WrittenMemory(nn.Module):
    """The memory that the sequence writes: slots are addresses, what they hold is the state.

    State, in fp32 or wider: delta (B, H, M, E), the deviation from V0, 4·slots·E bytes a sequence in fp32; mean (B, H, M, E) and the weights
    (B, H, M), 4·slots·(E + 1) bytes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, H, slots = config.hidden_size, config.num_attention_heads, config.num_memory_slots
        M, E = slots // H, D // H
        self.address = nn.Parameter(torch.empty(slots, D))
        plain = config.write_address == "keys"
        self.read_proj = nn.Parameter(torch.empty(slots, D)) if plain else None
        self.sharpness = None if plain else nn.Parameter(torch.empty(H))
        self.bank = nn.Parameter(torch.empty(H, M, E))
        self.prior = nn.Parameter(torch.empty(H, M)) if config.write == "mean" else None
        self.before = CausalConv(D, config.conv_kernel_size)
        self.value_proj = nn.Linear(D, D, bias=False)
        self.write_proj = nn.Linear(D, 2 * H)
        self.log_rate = nn.Parameter(torch.empty(H))
        self.norm = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(
        self, h_BTD: Tensor, gate_BTD: Tensor | None, conv_state: Tensor | None, state: tuple[Tensor, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Write and read for every token.

        Args:
            h_BTD: input of the mixer.
            gate_BTD: the gate of the global path, or None for no gate.
            conv_state: inputs of the convolution before h.
            state: of the memory before h, or None.
            segments: sequences and padding of the rows.

        Returns:
            The global path's output (B, T, D), and the new state.
        """
        H = self.config.num_attention_heads
        u_BTD, _ = self.before(h_BTD, conv_state, segments)
        read_BTHM, write_BTHM = self._addresses(h_BTD, u_BTD)
        value_BTHE = self.value_proj(h_BTD).unflatten(-1, (H, -1))
        gate_BTH, step_BTH = self.write_proj(h_BTD).float().chunk(2, -1) if h_BTD.dtype != torch.float64 else self.write_proj(h_BTD).chunk(2, -1)
        gate_BTH = gate_BTH.sigmoid() if self.config.write_gate == "learned" else torch.zeros_like(gate_BTH)
        log_decay_BTH = -self.log_rate.exp() * F.softplus(step_BTH)
        index_BT = None
        if segments is not None:  # padding writes nothing and forgets nothing
            gate_BTH, log_decay_BTH = (each * segments.real_BT[..., None] for each in (gate_BTH, log_decay_BTH))
            index_BT = segments.index_BT
        written = (read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, self.bank)
        L = self.config.chunk_size
        if self.prior is not None:
            g_BTHE, state = mean_memory(*written, F.softplus(self.prior), state, chunk_size=L, index_BT=index_BT)
        else:
            rule = fla_delta_memory if self.config.backend == "fla" else delta_memory
            g_BTHE, state = rule(*written, state, chunk_size=L, index_BT=index_BT)
        g_BTD = F.rms_norm(g_BTHE, g_BTHE.shape[-1:], eps=self.config.layer_norm_eps).flatten(-2) * self.norm
        return self.out_proj(g_BTD if gate_BTD is None else gate_BTD * g_BTD), state

    def _addresses(self, h_BTD: Tensor, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Where each token reads and where it writes (B, T, H, M): a distribution over the slots, or plain keys of length 1."""
        H, D, eps = self.config.num_attention_heads, self.config.hidden_size, self.config.layer_norm_eps
        if self.read_proj is not None:
            read, write = (F.silu(F.linear(x, w)).unflatten(-1, (H, -1)) for x, w in ((h_BTD, self.read_proj), (u_BTD, self.address)))
            return F.normalize(_wide(read), dim=-1), F.normalize(_wide(write), dim=-1)
        assert self.sharpness is not None
        address = self.address * self.sharpness.repeat_interleave(self.config.num_memory_slots // H)[:, None]
        read, write = (_wide(F.linear(F.rms_norm(x, (D,), eps=eps), address)).unflatten(-1, (H, -1)).softmax(-1) for x in (h_BTD, u_BTD))
        return read, F.normalize(write, dim=-1) if self.config.write == "delta" else write

    def initial_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Nothing written."""
        D_BHME = torch.zeros(batch_size, *self.bank.shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return (D_BHME,) if self.prior is None else (D_BHME, torch.zeros_like(D_BHME[..., 0]))

    def init_weights(self) -> None:
        """Addresses on the unit sphere, a bank of std 0.02 with prior weight 1, decays as in Mamba-2; the write address starts as the previous token."""
        config = self.config
        with torch.no_grad():
            for address in (self.address, self.read_proj):
                if address is not None:
                    nn.init.normal_(address, std=INIT_STD)
            if self.sharpness is not None:
                self.address.copy_(F.normalize(self.address, dim=-1))
                self.sharpness.fill_(SHARPNESS)
            nn.init.normal_(self.bank, std=INIT_STD)
            if self.prior is not None:
                self.prior.fill_(math.log(math.e - 1))  # the inverse of softplus at 1
            self.before.weight.zero_()
            self.before.weight[:, -2] = 1.0
            self.before.bias.zero_()
            init_linear(self.value_proj)
            init_linear(self.write_proj)
            H = config.num_attention_heads
            low, high = (math.log(x) for x in STEP_RANGE)
            step_H = torch.empty_like(self.log_rate).uniform_(low, high).exp()
            self.write_proj.bias[H:] = step_H + torch.log(-torch.expm1(-step_H))
            self.log_rate.uniform_(*RATE_RANGE).log_()
            self.norm.fill_(1.0)
            nn.init.normal_(self.out_proj.weight, std=INIT_STD / math.sqrt(2 * config.num_hidden_layers))


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GatedAssociativeMemory(Mixer):
    """The token mixer of GAM.

    State: the last K − 1 inputs of the convolution, (B, K − 1, D), 4·(K − 1)·D bytes a sequence in fp32; then that of the written memory,
    if there is one (:class:`WrittenMemory`).
    """

    uses = frozenset({"conv_kernel_size", "num_memory_slots", "fusion", "write"})
    backends = ("torch", "fla")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        written = config.write != "none"
        if written:
            self.uses = self.uses | {"num_attention_heads", "chunk_size", "write_gate", "write_address", "static_path"}
        self.conv = CausalConv(D, config.conv_kernel_size) if config.fusion != "global" else None
        self.memory = StaticMemory(config.num_memory_slots, D) if config.fusion != "local" and (not written or config.static_path) else None
        self.written = WrittenMemory(config) if written else None
        self.gate = nn.Linear(D, 2 * D) if config.fusion == "gate" else None

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See :meth:`Mixer.forward`."""
        segments = None if segments_BT is None else read_segments(segments_BT)
        local_gate_BTD, global_gate_BTD = self.gate(x_BTD).sigmoid().chunk(2, -1) if self.gate is not None else (None, None)
        paths, new_state = [], []
        if self.conv is not None:
            local_BTD, conv_state = self.conv(x_BTD, state[0] if state else None, segments)
            paths.append(local_BTD if local_gate_BTD is None else local_gate_BTD * local_BTD)
            new_state.append(conv_state)
        if self.memory is not None:
            global_BTD = self.memory(x_BTD)
            paths.append(global_BTD if global_gate_BTD is None else global_gate_BTD * global_BTD)
        if self.written is not None:
            written_BTD, memory_state = self.written(x_BTD, global_gate_BTD, state[0] if state else None, state[1:] if state else None, segments)
            paths.append(written_BTD)
            new_state += memory_state
        return sum(paths[1:], paths[0]), tuple(new_state)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """Zeros: nothing came before."""
        if self.conv is None:
            return ()
        dtype = dtype or torch.get_default_dtype()
        conv_state = torch.zeros(batch_size, self.config.conv_kernel_size - 1, self.config.hidden_size, device=device, dtype=dtype)
        return (conv_state, *(self.written.initial_state(batch_size, device, dtype) if self.written is not None else ()))

    def init_weights(self) -> None:
        """Convolution and bank as published; the gate by ``config.initialization``."""
        for part in (self.conv, self.memory, self.written):
            if part is not None:
                part.init_weights()
        if self.gate is not None:
            if self.config.initialization == "paper":
                self.gate.reset_parameters()
            else:
                init_linear(self.gate)

    @classmethod
    def backend_name(cls, config: ModelConfig) -> str:
        """torch, or for the delta rule on a GPU flash-linear-attention. Raises InputError where that one does not serve."""
        name = super().backend_name(config)
        if name == "fla" and config.write != "delta":
            raise InputError(
                f"backend is 'fla' with write={config.write!r}: flash-linear-attention has the delta rule alone, use write='delta' or backend='auto'"
            )
        return name

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Constant per token at every context."""
        D, K, slots = config.hidden_size, config.conv_kernel_size, config.num_memory_slots
        has_conv, has_gate, written = config.fusion != "global", config.fusion == "gate", config.write != "none"
        has_bank = config.fusion != "local" and (not written or config.static_path)
        flops = 2 * has_conv * D * K + 4 * has_bank * slots * D + 4 * has_gate * D * D
        common = Cost(
            parameters=has_conv * D * (K + 1) + has_bank * slots * D + has_gate * (2 * D * D + 2 * D),
            forward_flops=flops,
            decode_flops=flops,
            activations=(has_bank or has_gate or written) * D + has_conv * (1 + has_gate) * D + has_bank * (slots + has_gate * D) + 2 * has_gate * D,
            state_bytes=4 * has_conv * (K - 1) * D,
        )
        return common + _written_cost(config, context) if written else common

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """The taps of the convolution: the static memory is read by each token alone, and so is a written one into which nothing is written."""
        if config.write != "none" and config.write_gate == "learned":
            return None
        return 1 if config.fusion == "global" else config.conv_kernel_size


def _written_cost(config: ModelConfig, context: int) -> Cost:
    """What a written memory adds to the two paths."""
    D, K, H, slots = config.hidden_size, config.conv_kernel_size, config.num_attention_heads, config.num_memory_slots
    E, M, L = D // H, slots // H, min(config.chunk_size, context)
    plain, mean, has_gate = config.write_address == "keys", config.write == "mean", config.fusion == "gate"
    projections = 2 * (2 * slots * D + 2 * D * D + 2 * D * H + K * D)
    # Per token and head in chunks of L, whose L × L products are triangular only in what counts, not in what is computed: delta scores a by a and r by a,
    # inverts, solves for U and Y, reads what was written; V0 is read at a and at r, the state at Y and r, and written. mean has no system to solve.
    inside = 2 * L * (3 * M + 2 * E) + L * L if not mean else 2 * L * (2 * M + E)
    between = (5 if not mean else 3) * 2 * M * E
    step = (3 if not mean else 2) * 2 * M * E
    if mean:
        kept = (9 + has_gate) * D + 10 * slots + 7 * H + 3 * H * L
    else:
        kept = (9 + 2 * (not plain) + has_gate) * D + (14 if plain else 11) * slots + (12 if plain else 10) * H + 6 * H * L
    return Cost(
        parameters=slots * D * (1 + plain) + H * (not plain) + slots * E + slots * mean + D * (K + 1) + 2 * D * D + 2 * D * H + 2 * H + H + D,
        forward_flops=projections + H * (inside + between),
        decode_flops=projections + H * step,
        activations=kept + 2 * slots * E / L,
        state_bytes=4 * slots * (E + mean),
    )
