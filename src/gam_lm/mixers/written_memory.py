"""The memory that the sequence writes (see gam_lm.mixers.gam for the equations).

Shapes: B rows, T tokens, D = hidden_size, H heads, M slots of a head, S slots of all heads, E = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.addresses import Addresses
from gam_lm.mixers.base import INIT_STD, MOST_LOG_RATE, RATE_RANGE, Cost, init_linear, residual_branches, step_bias
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.ops.chunks import CPU_CHUNK
from gam_lm.ops.context_parallel import delta_over_pieces, mean_over_pieces
from gam_lm.ops.delta_rule_kernels import delta_rule_by
from gam_lm.ops.held import delta_held, mean_held
from gam_lm.ops.mean_rule import mean_memory
from gam_lm.ops.read_sources import MemoryInputs, Sources, delta_sources, mean_sources
from gam_lm.ops.segments import Segments


class WrittenMemory(Addresses):
    """Slots, or keys, are addresses; what they hold is the state.

    State, in fp32 or wider: delta (B, H, M, E), the deviation from V0, 4·S·E bytes a sequence in fp32; mean (B, H, M, E) and the weights
    (B, H, M), 4·S·(E + 1) bytes.
    """

    def __init__(self, config: ModelConfig, options: GAMOptions) -> None:
        super().__init__(config, options)
        D, H = config.hidden_size, self.num_heads
        M, E = self.num_slots // H, D // H
        self.bank = nn.Parameter(torch.empty(H, M, E))
        self.prior = nn.Parameter(torch.empty(H, M)) if self.options.write == "mean" else None
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
            conv_state: the mixer's inputs before h.
            state: of the memory before h, or None.
            segments: sequences and padding of the rows.

        Returns:
            The global path's output (B, T, D), and the new state.
        """
        inputs = self.inputs(h_BTD, conv_state, segments)
        written = (*inputs, self.bank)
        index_BT = None if segments is None else segments.index_BT
        L = self.options.chunk_size
        if self.prior is not None:
            g_BTHE, state = mean_over_pieces(mean_memory)(*written, F.softplus(self.prior), state, chunk_size=L, index_BT=index_BT)
        else:
            rule = delta_rule_by(self.options.backend, inputs.read_BTHM, inputs.value_BTHE)
            g_BTHE, state = delta_over_pieces(rule)(*written, state, chunk_size=L, index_BT=index_BT)
        g_BTD = F.rms_norm(g_BTHE, g_BTHE.shape[-1:], eps=self.config.layer_norm_eps).flatten(-2) * self.norm
        return self.out_proj(g_BTD if gate_BTD is None else gate_BTD * g_BTD), state

    def inputs(self, h_BTD: Tensor, conv_state: Tensor | None, segments: Segments | None = None) -> MemoryInputs:
        """Where each token reads and writes, what, how strongly, and what the memory keeps; arguments as of `forward`."""
        read_BTHM, write_BTHM = self.addresses(h_BTD, conv_state, segments)
        value_BTHE = self.value_proj(h_BTD).unflatten(-1, (self.num_heads, -1))
        write_BTX = self.write_proj(h_BTD)
        gate_BTH, step_BTH = write_BTX.to(torch.promote_types(write_BTX.dtype, torch.float32)).chunk(2, -1)
        gate_BTH = gate_BTH.sigmoid() if self.options.write_gate == "learned" else torch.zeros_like(gate_BTH)
        if self.options.max_write != 1:
            gate_BTH = gate_BTH * self.options.max_write
        log_decay_BTH = -self.log_rate.clamp(max=MOST_LOG_RATE).exp() * F.softplus(step_BTH)
        if segments is not None:  # padding writes nothing and forgets nothing
            gate_BTH, log_decay_BTH = (each * segments.real_BT[..., None] for each in (gate_BTH, log_decay_BTH))
        return MemoryInputs(read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH)

    def sources(self, inputs: MemoryInputs, state: tuple[Tensor, ...] | None) -> Sources:
        """Where each token's read comes from; ``state`` as of `forward`."""
        if self.prior is None:
            return delta_sources(inputs, self.bank, state[0] if state else None)
        return mean_sources(inputs, self.bank, F.softplus(self.prior), (state[0], state[1]) if state else None)

    def held(self, inputs: MemoryInputs, state: tuple[Tensor, ...] | None) -> Tensor:
        """How far each slot is from the bank after each token (B, T, H, M); ``state`` as of `forward`."""
        if self.prior is None:
            return delta_held(inputs, self.bank, state[0] if state else None)
        return mean_held(inputs, self.bank, F.softplus(self.prior), (state[0], state[1]) if state else None)

    def values(self) -> Tensor:
        """What each slot of all heads adds to the residual stream when it alone is read (S, D), the gate left aside."""
        g_HME = F.rms_norm(self.bank, self.bank.shape[-1:], eps=self.config.layer_norm_eps) * self.norm.unflatten(0, (len(self.bank), 1, -1))
        out_DHE = self.out_proj.weight.unflatten(1, (len(self.bank), -1))
        return torch.einsum("hme,dhe->hmd", g_HME, out_DHE).flatten(0, 1)

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`."""
        yield from super().matrices()
        yield self.value_proj.weight, (self.config.hidden_size,)
        yield self.out_proj.weight, (self.config.hidden_size,)

    def initial_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Nothing written."""
        D_BHME = torch.zeros(batch_size, *self.bank.shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return (D_BHME,) if self.prior is None else (D_BHME, torch.zeros_like(D_BHME[..., 0]))

    def init_weights(self) -> None:
        """A bank of std 0.02 with prior weight 1, decays as in Mamba-2, projections by ``config.initialization``."""
        config = self.config
        self.init_addresses()
        with torch.no_grad():
            nn.init.normal_(self.bank, std=INIT_STD)
            if self.prior is not None:
                self.prior.fill_(math.log(math.e - 1))  # the inverse of softplus at 1
            init_linear(self.value_proj, config)
            init_linear(self.write_proj, config)
            self.write_proj.bias[self.num_heads :] = step_bias(self.log_rate)
            self.log_rate.uniform_(*RATE_RANGE).log_()
            self.norm.fill_(1.0)
            init_linear(self.out_proj, config, residual=residual_branches(config, self.options))

    @classmethod
    def cost(cls, config: ModelConfig, options: GAMOptions, context: int) -> Cost:
        """What the memory adds to a layer."""
        D, K, H, S = config.hidden_size, options.conv_kernel_size, options.num_heads or 1, options.num_memory_slots or config.hidden_size
        E, M, L = D // H, S // H, min(options.chunk_size, CPU_CHUNK if options.write == "delta" else context, context)
        plain, mean, has_gate = options.write_address == "keys", options.write == "mean", options.gated_paths > 0
        projections = 2 * (S * D + 2 * D * D + 2 * D * H + K * S)
        # Per token and head in chunks of L, whose L × L products are triangular only in what counts, not in what is computed: delta scores a and r by a,
        # inverts, solves for W and reads it; V0 and the state are read at a and at r, and what was written goes into the state. mean has no system to solve.
        inside = 2 * L * (2 * M + 2 * E) + L * L if not mean else 2 * L * (2 * M + E)
        between = (5 if not mean else 3) * 2 * M * E
        step = (3 if not mean else 2) * 2 * M * E
        kept = (9 + has_gate) * D + 10 * S + 7 * H + 3 * H * L if mean else (7 + has_gate) * D + (7 if plain else 5) * S + 9 * H + 3 * H * L
        return Cost(
            parameters=S * D + H * (not plain) + S * E + S * mean + S * (K + 1) + 2 * D * D + 2 * D * H + 2 * H + H + D,
            forward_flops=projections + H * (inside + between),
            decode_flops=projections + 2 * (K - 1) * S * D + H * step,  # the scores of the tokens in the convolution are taken anew
            activations=kept + (1 + mean) * S * E / L,
            state_bytes=4 * S * (E + mean),
        )
