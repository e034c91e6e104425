"""Gated Associative Memory (arXiv 2509.00605, section 3): a local and a global path side by side, gated per token.

    local_t  = Σ_k w_k ∘ h_{t−K+1+k} + bias          causal depthwise convolution
    global_t = softmax(h_t Mᵀ) M                      retrieval from a memory of learned slots
    y_t      = σ(W_l h_t) ∘ local_t + σ(W_g h_t) ∘ global_t

The paper's memory is static, so that the global path moves nothing between tokens: one layer sees K tokens. With ``write="mean"`` or ``"delta"`` the
sequence edits what the slots hold. Per head, the learned rows K are the slots' addresses and V0 what they hold at first:

    s_t = τ K h_t                                                                  r_t = softmax(s_t)                  where to read
    v_t = W_v h_t,  b_t = σ(·),  log λ_t = −exp(A) softplus(·)                      a_t = softmax(Σ_k u_k ∘ s_{t−k})    where to write
    y_t = σ(W_l h_t) ∘ local_t + W_o (σ(W_g h_t) ∘ RMSNorm(g_t))                    g_t: gam_lm.ops.mean_rule, from r, a, v, b, λ and V0

With ``write_address="keys"`` K is a projection to plain keys: τ is 1, and SiLU(s) / ‖SiLU(s)‖ stands in place of both softmaxes, the rule of Gated DeltaNet
(arXiv 2412.06464). With ``gate_activation="silu"`` the gates are x·σ(x) in place of σ(x), as the output gates of Mamba and Gated DeltaNet are.

The taps u, a second causal convolution, start as the previous token: a value is written under the address of what came before it, so that a token reads
what followed its like.

Shapes: B rows, T tokens, D = hidden_size, K taps, H heads, M slots (of a head, where there are heads), E = D / H.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.base import Cost, Mixer, MixerState, MixerTrace, Slots, init_linear
from gam_lm.mixers.convolution import CausalConv
from gam_lm.mixers.memories import StaticMemory, WrittenMemory
from gam_lm.ops.segments import Segments, read_segments

MAX_UNROLLED = 16
"""Chunks of a written memory that a compiler unrolls in about a minute."""

OPEN = 1.0
"""Bias of a SiLU gate at the start: at 0 it is shut where a sigmoid is half open, and a path behind a shut gate of random sign learns late (docs/log.md)."""


class GAMMixer(Mixer):
    """The token mixer of GAM.

    State: the last K − 1 inputs of the convolution, (B, K − 1, D), 4·(K − 1)·D bytes a sequence in fp32; then that of the written memory,
    if there is one (:class:`gam_lm.mixers.memories.WrittenMemory`).
    """

    uses = frozenset({"conv_kernel_size", "num_memory_slots", "fusion", "keep_gate", "write"})
    backends = ("torch", "fla")
    exportable = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        written = config.write != "none"
        if written:
            self.uses = self.uses | {"num_attention_heads", "chunk_size", "write_gate", "write_address", "static_path"}
        if config.gated_paths:
            self.uses = self.uses | {"gate_activation"}
        self.conv = CausalConv(D, config.conv_kernel_size) if config.fusion != "global" else None
        self.memory = StaticMemory(config.num_memory_slots, D) if config.fusion != "local" and (not written or config.static_path) else None
        self.written = WrittenMemory(config) if written else None
        self.gate = nn.Linear(D, config.gated_paths * D) if config.gated_paths else None

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See :meth:`Mixer.forward`."""
        segments = None if segments_BT is None else read_segments(segments_BT)
        paths, new_state = self._paths(x_BTD, self._gates(x_BTD), state, segments)
        return sum(paths[1:], paths[0]), new_state

    def compiles(self, context: int) -> bool:
        """See :meth:`Mixer.compiles`."""
        return self.written is None or context <= MAX_UNROLLED * self.config.chunk_size

    def _paths(
        self, x_BTD: Tensor, gates: tuple[Tensor | None, Tensor | None], state: MixerState | None, segments: Segments | None
    ) -> tuple[list[Tensor], MixerState]:
        """What each path adds, in the order of ``path_names``, and the new state."""
        local_gate_BTD, global_gate_BTD = gates
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
        return paths, tuple(new_state)

    @property
    def path_names(self) -> list[str]:
        """Names of the paths that there are: local, static, written."""
        return [name for name, part in (("local", self.conv), ("static", self.memory), ("written", self.written)) if part is not None]

    def trace(self, x_BTD: Tensor, state: MixerState | None = None) -> MixerTrace:
        """See :meth:`Mixer.trace`."""
        gates = self._gates(x_BTD)
        paths, _ = self._paths(x_BTD, gates, state, None)
        names = self.path_names
        found: dict[str, Any] = {"reads": {}}
        if self.conv is not None:
            earlier_BJD = state[0] if state else x_BTD.new_zeros(len(x_BTD), self.config.conv_kernel_size - 1, x_BTD.shape[-1])
            window_BTDK = torch.cat([earlier_BJD, x_BTD], 1).unfold(1, self.config.conv_kernel_size, 1)
            found["taps_BTK"] = (window_BTDK * self.conv.weight).norm(dim=2)
        if self.memory is not None:
            found["reads"]["static"] = self.memory.shares(x_BTD)
        if self.written is not None:
            inputs = self.written.inputs(x_BTD, state[0] if state else None)
            sources = self.written.sources(inputs, state[1:] if state else None)
            found["reads"]["written"] = self.written.shares(inputs.read_BTHM)
            length_BH1I = inputs.value_BTHE.to(sources.weight_BHTI.dtype).norm(dim=-1).mT[:, :, None]
            found |= {
                "writes_BTS": self.written.shares(inputs.write_BTHM), "write_gate_BT": inputs.gate_BTH.mean(-1),
                "sources_BTI": (sources.weight_BHTI.abs() * length_BH1I).sum(1),
                "carried_BT": sources.carried_BTHE.norm(dim=-1).sum(-1), "bank_BT": sources.bank_BTHE.norm(dim=-1).sum(-1),
            }  # fmt: skip
        gate_of = {"local": gates[0], "static": gates[1], "written": gates[1]}
        return MixerTrace(
            paths=dict(zip(names, paths, strict=True)), gates={name: gate for name in names if (gate := gate_of[name]) is not None}, **found
        )

    def slots(self) -> Mapping[str, Slots]:
        """See :meth:`Mixer.slots`."""
        found = {}
        if self.memory is not None:
            found["static"] = Slots(address_SD=self.memory.bank, value_SD=self.memory.bank)
        if self.written is not None:
            found["written"] = Slots(address_SD=self.written.address, value_SD=self.written.values())
        return found

    def silence(self, memory: str, slot: int | None) -> None:
        """See :meth:`Mixer.silence`."""
        part = {"static": self.memory, "written": self.written}[memory]
        if part is None:
            raise KeyError(memory)
        part.silent_M = None
        if slot is not None:
            part.silent_M = torch.zeros(self.config.num_memory_slots, dtype=torch.bool, device=part.bank.device)
            part.silent_M[slot] = True

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gates of the local and the global path; a path that stands alone has the only one."""
        if self.gate is None:
            return None, None
        activation = F.silu if self.config.gate_activation == "silu" else torch.sigmoid
        gate_BTX: Tensor = activation(self.gate(x_BTD))
        local_gate_BTD, global_gate_BTD = gate_BTX.chunk(2, -1) if self.config.fusion == "gate" else (gate_BTX, gate_BTX)
        return local_gate_BTD, global_gate_BTD

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """Zeros: nothing came before."""
        if self.conv is None:
            return ()
        dtype = dtype or torch.get_default_dtype()
        conv_state = torch.zeros(batch_size, self.config.conv_kernel_size - 1, self.config.hidden_size, device=device, dtype=dtype)
        return (conv_state, *(self.written.initial_state(batch_size, device, dtype) if self.written is not None else ()))

    def init_weights(self) -> None:
        """Convolution and bank as published; the gate by ``config.initialization``, and open."""
        for part in (self.conv, self.memory, self.written):
            if part is not None:
                part.init_weights()
        if self.gate is not None:
            init_linear(self.gate, self.config)
            if self.config.gate_activation == "silu":
                nn.init.constant_(self.gate.bias, OPEN)

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
        has_conv, written = config.fusion != "global", config.write != "none"
        gates = config.gated_paths
        held_gates = gates * (1 if config.gate_activation == "sigmoid" else 2)  # the sigmoid's gradient needs only what it gave
        has_bank = config.fusion != "local" and (not written or config.static_path)
        flops = 2 * has_conv * D * K + 4 * has_bank * slots * D + 2 * gates * D * D
        common = Cost(
            parameters=has_conv * D * (K + 1) + has_bank * slots * D + gates * (D * D + D),
            forward_flops=flops,
            decode_flops=flops,
            activations=(has_bank or gates or written) * D + has_conv * D * (1 + (gates > 0)) + has_bank * (slots + D * (gates > 0)) + held_gates * D,
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
    projections = 2 * (slots * D + 2 * D * D + 2 * D * H + K * slots)
    # Per token and head in chunks of L, whose L × L products are triangular only in what counts, not in what is computed: delta scores a and r by a,
    # inverts, solves for W and reads it; V0 and the state are read at a and at r, and what was written goes into the state. mean has no system to solve.
    inside = 2 * L * (2 * M + 2 * E) + L * L if not mean else 2 * L * (2 * M + E)
    between = (5 if not mean else 3) * 2 * M * E
    step = (3 if not mean else 2) * 2 * M * E
    kept = (9 + has_gate) * D + 10 * slots + 7 * H + 3 * H * L if mean else (7 + has_gate) * D + (7 if plain else 5) * slots + 9 * H + 3 * H * L
    return Cost(
        parameters=slots * D + H * (not plain) + slots * E + slots * mean + slots * (K + 1) + 2 * D * D + 2 * D * H + 2 * H + H + D,
        forward_flops=projections + H * (inside + between),
        decode_flops=projections + 2 * (K - 1) * slots * D + H * step,  # the scores of the tokens in the convolution are taken anew
        activations=kept + (1 + mean) * slots * E / L,
        state_bytes=4 * slots * (E + mean),
    )
