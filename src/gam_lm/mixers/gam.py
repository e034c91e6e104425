"""Gated Associative Memory (arXiv 2509.00605, section 3): a local and a global path side by side, gated per token.

    local_t  = Σ_k w_k ∘ h_{t−K+1+k} + bias          causal depthwise convolution
    global_t = softmax(h_t Mᵀ) M                      retrieval from a memory of learned slots
    y_t      = σ(W_l h_t) ∘ local_t + σ(W_g h_t) ∘ global_t

The paper's memory is static, so that the global path moves nothing between tokens: one layer sees K tokens. With ``write="mean"`` or ``"delta"`` the
sequence edits what the memory holds. Per head, with a learned projection K to keys and the bank V0 as the memory before a word was read:

    k_t = SiLU(K h_t) / max(‖·‖, 1)                    where to read; softmax(τ K h_t) where K are the addresses of learned slots
    a_t = the same of a causal convolution of K h      where to write, at first "the token before" (gam_lm.mixers.addresses)
    v_t = W_v h_t,  b_t = σ(·),  log λ_t = −exp(A) softplus(·)
    y_t = φ(W_l h_t) ∘ local_t + W_o (φ(W_g h_t) ∘ RMSNorm(g_t))          g_t: gam_lm.ops.delta_rule or mean_rule, from k, a, v, b, λ and V0

φ is σ in the paper, and SiLU, open at initialisation, by default. With ``memory="attention"`` softmax attention over the same keys gives g_t, with
``memory="self_attention"`` that of a Llama block.

Shapes: B rows, T tokens, D = hidden_size, K taps, H heads, M slots (of a head, where there are heads), E = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.attention_memory import AttentionMemory
from gam_lm.mixers.base import MAX_UNROLLED, Cost, Mixer, MixerState, MixerTrace, Slots, init_linear
from gam_lm.mixers.convolution import CausalConv
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.mixers.self_attention_memory import SelfAttentionMemory
from gam_lm.mixers.static_memory import StaticMemory
from gam_lm.mixers.written_memory import WrittenMemory
from gam_lm.ops.causal_conv import last_inputs
from gam_lm.ops.chunks import chunk_tokens
from gam_lm.ops.context_parallel import inputs_before, number_segments
from gam_lm.ops.delta_rule_kernels import automatic_backend
from gam_lm.ops.segments import Segments

WITH_HEADS: Mapping[str, type[WrittenMemory | AttentionMemory | SelfAttentionMemory]] = {
    "bank": WrittenMemory, "attention": AttentionMemory, "self_attention": SelfAttentionMemory,
}  # fmt: skip
"""By ``memory``: what has heads and moves something between tokens."""

OPEN = 1.0
"""Bias of a SiLU gate at initialisation: at 0 it is shut where a sigmoid is half open, and a path behind a shut gate of random sign learns late (docs/log.md)."""


class GAMMixer(Mixer):
    """The token mixer of GAM.

    State: the last K − 1 inputs (B, K − 1, D), 4·(K − 1)·D bytes a sequence in fp32, then that of the written memory or of the attention in its place;
    nothing for a static memory without its local path.
    """

    options_type: ClassVar[type[GAMOptions]] = GAMOptions
    options: GAMOptions
    backends = ("torch", "fla", "triton")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, options = config.hidden_size, self.options
        slots: int = options.num_memory_slots or D
        self.conv = CausalConv(D, options.conv_kernel_size) if options.fusion != "global" else None
        has_bank = options.memory == "bank" and options.fusion != "local" and (not options.written or options.static_path)
        self.memory = StaticMemory(slots, D) if has_bank else None
        self.written = WITH_HEADS[options.memory](config, options) if options.has_heads else None
        self.gate = nn.Linear(D, options.gated_paths * D) if options.gated_paths else None
        self.over_pieces = options.memory == "bank"  # type: ignore[misc]
        if options.memory == "bank":
            self.prefill_tokens = options.chunk_size if options.written else 0  # type: ignore[misc]

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See `Mixer.forward`."""
        segments = None if segments_BT is None or not segments_BT.numel() else number_segments(segments_BT)
        paths, new_state = self._paths(x_BTD, self._gates(x_BTD), state, segments)
        return sum(paths[1:], paths[0]), new_state

    @classmethod
    def automatic_backend(cls, config: ModelConfig, device_type: str) -> str:
        """See `Mixer.automatic_backend`."""
        options = config.options_of(cls.options_type)
        if not options.written or options.write != "delta":
            return "torch"
        return automatic_backend(device_type, (options.num_memory_slots or config.hidden_size) // (options.num_heads or 1), torch.get_default_dtype())

    def compiles(self, context: int) -> bool:
        """See `Mixer.compiles`."""
        if not isinstance(self.written, WrittenMemory):
            return True
        size, device = self.options.chunk_size, self.written.before.weight.device
        if self.backend_name(self.config, str(device)) == "triton":
            return True
        return context <= MAX_UNROLLED * (chunk_tokens(size, device) if self.options.write == "delta" else size)

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`."""
        if self.gate is not None:
            yield self.gate.weight, (self.config.hidden_size,) * self.options.gated_paths
        if self.written is not None:
            yield from self.written.matrices()

    def _paths(
        self, x_BTD: Tensor, gates: tuple[Tensor | None, Tensor | None], state: MixerState | None, segments: Segments | None
    ) -> tuple[list[Tensor], MixerState]:
        """What each path adds, in the order of ``path_names``, and the new state."""
        local_gate_BTD, global_gate_BTD = gates
        inputs_BJD, memory_state = (state[0], state[1:]) if state and self.options.keeps_inputs else (None, state)
        paths, new_state = [], []
        if self.conv is not None:
            local_BTD, new_inputs_BJD = self.conv(x_BTD, inputs_BJD, segments)
            paths.append(local_BTD if local_gate_BTD is None else local_gate_BTD * local_BTD)
            new_state.append(new_inputs_BJD)
        elif self.options.keeps_inputs:
            J = self.options.conv_kernel_size - 1
            new_state.append(last_inputs(x_BTD, J, inputs_before(x_BTD, J, inputs_BJD, segments), segments))
        if self.memory is not None:
            global_BTD = self.memory(x_BTD)
            paths.append(global_BTD if global_gate_BTD is None else global_gate_BTD * global_BTD)
        if self.written is not None:
            written_BTD, memory_state = self.written(x_BTD, global_gate_BTD, inputs_BJD, memory_state, segments)
            paths.append(written_BTD)
            new_state += memory_state
        return paths, tuple(new_state)

    @property
    def path_names(self) -> list[str]:
        """Names of the paths that there are: local, static, written (or attention)."""
        written = "written" if self.options.memory == "bank" else "attention"
        return [name for name, part in (("local", self.conv), ("static", self.memory), (written, self.written)) if part is not None]

    def trace(self, x_BTD: Tensor, state: MixerState | None = None) -> MixerTrace:
        """See `Mixer.trace`."""
        gates = self._gates(x_BTD)
        paths, _ = self._paths(x_BTD, gates, state, None)
        names = self.path_names
        found: dict[str, Any] = {"reads": {}}
        if self.conv is not None:
            earlier_BJD = state[0] if state else x_BTD.new_zeros(len(x_BTD), self.options.conv_kernel_size - 1, x_BTD.shape[-1])
            window_BTDK = torch.cat([earlier_BJD, x_BTD], 1).unfold(1, self.options.conv_kernel_size, 1)
            found["taps_BTK"] = (window_BTDK * self.conv.weight).norm(dim=2)
        if self.memory is not None:
            found["reads"]["static"] = self.memory.shares(x_BTD)
        if isinstance(self.written, WrittenMemory):
            inputs = self.written.inputs(x_BTD, state[0] if state else None)
            sources = self.written.sources(inputs, state[1:] if state else None)
            found["reads"]["written"] = self.written.shares(inputs.read_BTHM)
            length_BH1I = inputs.value_BTHE.to(sources.weight_BHTI.dtype).norm(dim=-1).mT[:, :, None]
            found |= {
                "held_BTS": self.written.held(inputs, state[1:] if state else None).flatten(-2),
                "writes_BTS": self.written.shares(inputs.write_BTHM), "write_gate_BT": inputs.gate_BTH.mean(-1),
                "sources_BTI": (sources.weight_BHTI.abs() * length_BH1I).sum(1),
                "carried_BT": sources.carried_BTHE.norm(dim=-1).sum(-1), "bank_BT": sources.bank_BTHE.norm(dim=-1).sum(-1),
            }  # fmt: skip
        gate_of = {name: gates[0] if name == "local" else gates[1] for name in names}
        return MixerTrace(
            paths=dict(zip(names, paths, strict=True)), gates={name: gate for name, gate in gate_of.items() if gate is not None}, **found
        )

    def slots(self) -> Mapping[str, Slots]:
        """See `Mixer.slots`."""
        found = {}
        if self.memory is not None:
            found["static"] = Slots(address_SD=self.memory.bank, value_SD=self.memory.bank)
        if isinstance(self.written, WrittenMemory):
            found["written"] = Slots(address_SD=self.written.address_SD(), value_SD=self.written.values())
        return found

    def initial_memory(self) -> Mapping[str, nn.Parameter]:
        """See `Mixer.initial_memory`."""
        return {"written.bank": self.written.bank} if isinstance(self.written, WrittenMemory) else {}

    def silence(self, memory: str, slot: int | None) -> None:
        """See `Mixer.silence`."""
        found = self.slots()[memory]
        part: Any = self.memory if memory == "static" else self.written
        part.silent_M = None
        if slot is not None:
            part.silent_M = torch.zeros(len(found.address_SD), dtype=torch.bool, device=found.address_SD.device)
            part.silent_M[slot] = True

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gates of the local and the global path; a path that stands alone has the only one."""
        if self.gate is None:
            return None, None
        activation = F.silu if self.options.gate_activation == "silu" else torch.sigmoid
        gate_BTX: Tensor = activation(self.gate(x_BTD))
        local_gate_BTD, global_gate_BTD = gate_BTX.chunk(2, -1) if self.options.fusion == "gate" else (gate_BTX, gate_BTX)
        return local_gate_BTD, global_gate_BTD

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """Zeros: nothing came before."""
        inputs = self._no_inputs(batch_size, device, dtype or torch.get_default_dtype())
        return (*inputs, *(self.written.initial_state(batch_size, device, dtype or torch.get_default_dtype()) if self.written is not None else ()))

    def _no_inputs(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> MixerState:
        if not self.options.keeps_inputs:
            return ()
        return (torch.zeros(batch_size, self.options.conv_kernel_size - 1, self.config.hidden_size, device=device, dtype=dtype),)

    def filled_cache(
        self, batch_size: int, tokens: int, room: int, *, device: torch.device | str | None = None, dtype: torch.dtype
    ) -> MixerState | None:
        """See `Mixer.filled_cache`."""
        if not isinstance(self.written, AttentionMemory | SelfAttentionMemory):
            return None
        return (*self._no_inputs(batch_size, device, dtype), *self.written.filled_cache(batch_size, tokens, room, device, dtype))

    def init_weights(self) -> None:
        """Convolution and static bank as published; the gate by ``config.initialization``, and open."""
        for part in (self.conv, self.memory, self.written):
            if part is not None:
                part.init_weights()
        if self.gate is not None:
            init_linear(self.gate, self.config)
            if self.options.gate_activation == "silu":
                nn.init.constant_(self.gate.bias, OPEN)

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Constant per token at every context, but for attention in the memory's place."""
        options = config.options_of(cls.options_type)
        D, K, slots = config.hidden_size, options.conv_kernel_size, options.num_memory_slots or config.hidden_size
        has_conv, with_heads = options.fusion != "global", options.has_heads
        gates = options.gated_paths
        held_gates = gates * (1 if options.gate_activation == "sigmoid" else 2)  # the sigmoid's gradient needs only what it gave
        has_bank = options.memory == "bank" and options.fusion != "local" and (not options.written or options.static_path)
        flops = 2 * has_conv * D * K + 4 * has_bank * slots * D + 2 * gates * D * D
        held_bank = has_bank * (slots + D * (gates > 0))
        common = Cost(
            parameters=has_conv * D * (K + 1) + has_bank * slots * D + gates * (D * D + D),
            forward_flops=flops,
            decode_flops=flops,
            activations=bool(has_bank or gates or with_heads) * D + has_conv * D * (1 + (gates > 0)) + held_bank + held_gates * D,
            state_bytes=4 * options.keeps_inputs * (K - 1) * D,
        )
        if not with_heads:
            return common
        return common + WITH_HEADS[options.memory].cost(config, options, context)

    @classmethod
    def rule(cls, config: ModelConfig) -> str:
        """See `Mixer.rule`."""
        options = config.options_of(cls.options_type)
        return "delta rule" if options.written and options.write == "delta" else ""

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """The taps of the convolution: the static memory is read by each token alone, and so is a written one into which nothing is written."""
        options = config.options_of(cls.options_type)
        if options.memory != "bank" or (options.written and options.write_gate == "learned"):
            return None
        return 1 if options.fusion == "global" and not options.written else options.conv_kernel_size

    @classmethod
    def advice(cls, config: ModelConfig) -> str:
        """See `Mixer.advice`."""
        if cls.reach(config) is None:
            return ""
        return (
            "The memory is static: each token reads it alone, and only the convolution moves anything between tokens. "
            'For more: write="delta" or "mean" (the sequence writes the memory, no limit), or each layer one tap more than '
            f"{config.options_of(cls.options_type).conv_kernel_size} for {config.num_hidden_layers} tokens."
        )
