"""The two memories of GAM: the paper's static bank, and the one that the sequence writes (see gam_lm.mixers.gam for the equations).

Shapes: B rows, T tokens, D = hidden_size, H heads, M slots (of a head, where there are heads), S slots of all heads, E = D / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import INIT_STD, init_linear, start_std
from gam_lm.mixers.convolution import CausalConv
from gam_lm.ops.delta_rule import delta_memory, fla_delta_memory
from gam_lm.ops.mean_rule import mean_memory
from gam_lm.ops.read_sources import MemoryInputs, Sources, delta_sources, mean_sources
from gam_lm.ops.retrieval import retrieve
from gam_lm.ops.segments import Segments

SHARPNESS = 4.0
"""τ at the start: with addresses on the unit sphere, the standard deviation of a score."""

RATE_RANGE, STEP_RANGE = (1.0, 16.0), (1e-3, 0.1)
"""Decays at the start, as in Mamba-2 (arXiv 2405.21060): exp(A) uniform, softplus(·) log-uniform. A head forgets over 1 to 1,000 tokens."""


class StaticMemory(nn.Module):
    """The paper's memory: one learned bank, which is both keys and values."""

    def __init__(self, num_slots: int, hidden_size: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.empty(num_slots, hidden_size))
        self.silent_M: Tensor | None = None
        """Slots that are taken out (see :meth:`Mixer.silence`)."""

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
        self.sharpness = nn.Parameter(torch.empty(H)) if config.write_address == "slots" else None
        self.bank = nn.Parameter(torch.empty(H, M, E))
        self.prior = nn.Parameter(torch.empty(H, M)) if config.write == "mean" else None
        self.before = CausalConv(slots, config.conv_kernel_size)
        self.value_proj = nn.Linear(D, D, bias=False)
        self.write_proj = nn.Linear(D, 2 * H)
        self.log_rate = nn.Parameter(torch.empty(H))
        self.norm = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, D, bias=False)
        self.silent_M: Tensor | None = None
        """Slots of all heads that are taken out (see :meth:`Mixer.silence`)."""

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
        inputs = self.inputs(h_BTD, conv_state, segments)
        written = (*inputs, self.bank)
        index_BT = None if segments is None else segments.index_BT
        L = self.config.chunk_size
        if self.prior is not None:
            g_BTHE, state = mean_memory(*written, F.softplus(self.prior), state, chunk_size=L, index_BT=index_BT)
        else:
            rule = fla_delta_memory if self.config.backend == "fla" else delta_memory
            g_BTHE, state = rule(*written, state, chunk_size=L, index_BT=index_BT)
        g_BTD = F.rms_norm(g_BTHE, g_BTHE.shape[-1:], eps=self.config.layer_norm_eps).flatten(-2) * self.norm
        return self.out_proj(g_BTD if gate_BTD is None else gate_BTD * g_BTD), state

    def inputs(self, h_BTD: Tensor, conv_state: Tensor | None, segments: Segments | None = None) -> MemoryInputs:
        """Where each token reads and writes, what, how strongly, and what the memory keeps; arguments as of :meth:`forward`."""
        H = self.config.num_attention_heads
        read_BTHM, write_BTHM = self._addresses(h_BTD, conv_state, segments)
        value_BTHE = self.value_proj(h_BTD).unflatten(-1, (H, -1))
        gate_BTH, step_BTH = self.write_proj(h_BTD).float().chunk(2, -1) if h_BTD.dtype != torch.float64 else self.write_proj(h_BTD).chunk(2, -1)
        gate_BTH = gate_BTH.sigmoid() if self.config.write_gate == "learned" else torch.zeros_like(gate_BTH)
        log_decay_BTH = -self.log_rate.exp() * F.softplus(step_BTH)
        if segments is not None:  # padding writes nothing and forgets nothing
            gate_BTH, log_decay_BTH = (each * segments.real_BT[..., None] for each in (gate_BTH, log_decay_BTH))
        return MemoryInputs(read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH)

    def _addresses(self, h_BTD: Tensor, conv_state: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """Where each token reads and where it writes (B, T, H, M): a distribution over the slots, or plain keys of length 1."""
        H = self.config.num_attention_heads
        address_SD: Tensor = self.address
        if self.sharpness is not None:
            address_SD = address_SD * self.sharpness.repeat_interleave(self.config.num_memory_slots // H)[:, None]
        # The taps see scores, not inputs: the projection is linear, and so one product serves both addresses.
        if conv_state is None:
            read_BTS, before_BJS = F.linear(h_BTD, address_SD), None
        else:
            J = conv_state.shape[1]
            before_BJS, read_BTS = F.linear(torch.cat([conv_state.to(h_BTD.dtype), h_BTD], 1), address_SD).split([J, h_BTD.shape[1]], 1)
        write_BTS, _ = self.before(read_BTS, before_BJS, segments)
        read_BTHM, write_BTHM = (scores_BTS.unflatten(-1, (H, -1)) for scores_BTS in (read_BTS, write_BTS))
        if self.sharpness is None:
            read_BTHM, write_BTHM = (self._audible(F.silu(keys_BTHM)) for keys_BTHM in (read_BTHM, write_BTHM))
            return F.normalize(read_BTHM, dim=-1), F.normalize(write_BTHM, dim=-1)
        read_BTHM, write_BTHM = (self._audible(scores_BTHM.softmax(-1), 1) for scores_BTHM in (read_BTHM, write_BTHM))
        return read_BTHM, F.normalize(write_BTHM, dim=-1) if self.config.write == "delta" else write_BTHM

    def _audible(self, weight_BTHM: Tensor, total: float | None = None) -> Tensor:
        """The weights without those of silent slots, the others scaled back to ``total``."""
        if self.silent_M is None:
            return weight_BTHM
        weight_BTHM = weight_BTHM * ~self.silent_M.view(weight_BTHM.shape[-2:])
        return weight_BTHM if total is None else total * weight_BTHM / weight_BTHM.sum(-1, keepdim=True).clamp(min=1e-30)

    def sources(self, inputs: MemoryInputs, state: tuple[Tensor, ...] | None) -> Sources:
        """Where each token's read comes from; ``state`` as of :meth:`forward`."""
        if self.prior is None:
            return delta_sources(inputs, self.bank, state[0] if state else None)
        return mean_sources(inputs, self.bank, F.softplus(self.prior), (state[0], state[1]) if state else None)

    def shares(self, weight_BTHM: Tensor) -> Tensor:
        """Weights as shares of the slots of all heads (B, T, S): plain keys, which may be negative, by their squares."""
        weight_BTHM = weight_BTHM**2 if self.sharpness is None or self.config.write == "delta" else weight_BTHM
        return (weight_BTHM / weight_BTHM.sum(-1, keepdim=True).clamp(min=1e-30) / self.config.num_attention_heads).flatten(-2)

    def values(self) -> Tensor:
        """What each slot of all heads adds to the residual stream when it alone is read (S, D), the gate left aside."""
        g_HME = F.rms_norm(self.bank, self.bank.shape[-1:], eps=self.config.layer_norm_eps) * self.norm.unflatten(0, (len(self.bank), 1, -1))
        out_DHE = self.out_proj.weight.unflatten(1, (len(self.bank), -1))
        return torch.einsum("hme,dhe->hmd", g_HME, out_DHE).flatten(0, 1)

    def initial_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Nothing written."""
        D_BHME = torch.zeros(batch_size, *self.bank.shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return (D_BHME,) if self.prior is None else (D_BHME, torch.zeros_like(D_BHME[..., 0]))

    def init_weights(self) -> None:
        """Addresses on the unit sphere, a bank of std 0.02 with prior weight 1, decays as in Mamba-2, projections by ``config.initialization``; the
        write address starts as the previous token."""
        config = self.config
        with torch.no_grad():
            nn.init.normal_(self.address, std=start_std(config, config.hidden_size))
            if self.sharpness is not None:
                self.address.copy_(F.normalize(self.address, dim=-1))
                self.sharpness.fill_(SHARPNESS)
            nn.init.normal_(self.bank, std=INIT_STD)
            if self.prior is not None:
                self.prior.fill_(math.log(math.e - 1))  # the inverse of softplus at 1
            self.before.weight.zero_()
            self.before.weight[:, -2] = 1.0
            self.before.bias.zero_()
            init_linear(self.value_proj, config)
            init_linear(self.write_proj, config)
            H = config.num_attention_heads
            low, high = (math.log(x) for x in STEP_RANGE)
            step_H = torch.empty_like(self.log_rate).uniform_(low, high).exp()
            self.write_proj.bias[H:] = step_H + torch.log(-torch.expm1(-step_H))
            self.log_rate.uniform_(*RATE_RANGE).log_()
            self.norm.fill_(1.0)
            init_linear(self.out_proj, config, residual=True)
