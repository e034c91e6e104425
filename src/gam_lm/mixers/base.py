"""The contract of a token mixer.

Everything outside this package asks a mixer through this class and never branches on its name.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.options import MixerOptions

MixerState = tuple[Tensor, ...]
"""What one mixer carries from token to token: tensors with the batch first."""

MOST_LOG_RATE = 20.0
"""Beyond e^20 a learned decay rate forgets everything at once; its exponential is capped, so that a rate that ran away stays a number."""

INIT_STD = 0.02
"""Standard deviation of the scaled initialisation, at every width."""

RATE_RANGE, STEP_RANGE = (1.0, 16.0), (1e-3, 0.1)
"""Decays at initialisation, as in Mamba-2 (arXiv 2405.21060): exp(A) uniform, softplus(·) log-uniform. A head forgets over 1 to 1,000 tokens."""

MAX_UNROLLED = 16
"""Chunks of a written memory that a compiler unrolls in about a minute."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer of a mixer costs at a context length, for one sequence, counting a multiply-add as two operations."""

    parameters: int
    """Number of parameters."""
    forward_flops: float
    """Operations of the matrix products of a forward pass per token, averaged over the context."""
    decode_flops: float
    """Operations of the matrix products for one more token after the context."""
    activations: float
    """Numbers kept per token for the backward pass."""
    state_bytes: int
    """Bytes carried from token to token after the context, in fp32."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)})


@dataclass(frozen=True, kw_only=True)
class MixerTrace:
    """What happened at each token of one call of a mixer: what each path did, and where a memory was read and written."""

    paths: Mapping[str, Tensor]
    """By path: what it added to the residual stream (B, T, D). Together they are the mixer's output."""
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    """By path: its gate (B, T, D), where it has one."""
    taps_BTK: Tensor | None = None
    """Length of what each tap of the convolution brought, the last one being the current token."""
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    """By memory: the share of each slot in the read (B, T, S), slots of all heads side by side; shares add up to 1."""
    writes_BTS: Tensor | None = None
    """The share of each slot in the write, likewise."""
    write_gate_BT: Tensor | None = None
    """How strongly each token wrote, the mean over the heads."""
    held_BTS: Tensor | None = None
    """How far each slot is from what the learned bank holds after each token (a length), slots of all heads side by side."""
    sources_BTI: Tensor | None = None
    """How much of each token of this call a token read from the memory (lengths, summed over the heads)."""
    carried_BT: Tensor | None = None
    """The same of what was written before the call."""
    bank_BT: Tensor | None = None
    """The same of the learned bank."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The learned slots of one memory of a mixer."""

    address_SD: Tensor
    """Where each slot is: it is read by inputs of the mixer that point its way."""
    value_SD: Tensor
    """What each slot adds to the residual stream when it alone is read, the gate left aside."""


class Mixer(nn.Module, ABC):
    """y = mixer(x): the one part of a block in which tokens meet."""

    options_type: ClassVar[type[MixerOptions]] = MixerOptions
    """Its options class."""

    backends: ClassVar[tuple[str, ...]] = ("torch",)
    """Names of its implementations; the first is what backend="auto" takes unless `automatic_backend` says otherwise."""

    prefill_tokens: ClassVar[int | None] = None
    """Tokens that one exported graph takes at a time: a number, 0 for any, None where the mixer cannot be exported; an instance may set its own."""

    over_pieces: ClassVar[bool] = False
    """Whether a sequence may lie in pieces on several processes (see gam_lm.ops.context_parallel); an instance may set its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.options = config.options_of(self.options_type)
        self.backend = self.backend_name(config)

    def compiles(self, context: int) -> bool:
        """Whether torch.compile makes a block faster in training on sequences of ``context`` tokens; a long loop over chunks takes it minutes."""
        return True

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """The weight matrices that an optimiser of matrices (Muon) takes, each with the rows of the logical blocks of which it consists."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                yield part.weight, (len(part.weight),)

    @abstractmethod
    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """Mix the tokens of each row, causally.

        Args:
            x_BTD: normalised input of the block.
            state: of the tokens before x, as a call returned it; None starts the sequences.
            segments_BT: ids of the sequences in each row, 0 for padding (see gam_lm.ops.segments); the first
                real token of a row continues ``state``.

        Returns:
            The output (B, T, D) and the state after the last token. Any split of a sequence into calls gives the output of one call.
        """

    @abstractmethod
    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """The state before the first token: ``mixer(x, initial_state)`` equals ``mixer(x)``. Memories are fp32 or wider whatever ``dtype``."""

    def filled_cache(
        self, batch_size: int, tokens: int, room: int, *, device: torch.device | str | None = None, dtype: torch.dtype
    ) -> MixerState | None:
        """For measuring: a state of the size that ``tokens`` tokens leave, filled at random, with room for more that go in one at a time, in place.

        None where the state does not grow.
        """
        return None

    @abstractmethod
    def init_weights(self) -> None:
        """Draw the start values that ``config.initialization`` asks for."""

    @classmethod
    def backend_name(cls, config: ModelConfig, device: str | None = None) -> str:
        """Which implementation runs for ``config`` on ``device`` ("cpu", "cuda:1"; None: a GPU if there is one), as results name it."""
        name = config.options_of(cls.options_type).backend
        if name != "auto":
            return name
        return cls.automatic_backend(config, device.partition(":")[0] if device else "cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def automatic_backend(cls, config: ModelConfig, device_type: str) -> str:
        """What backend="auto" takes on a device."""
        return cls.backends[0]

    @classmethod
    def rule(cls, config: ModelConfig) -> str:
        """What its backends compute, as the log names it; empty where ``config`` leaves no choice of them."""
        return ""

    @classmethod
    @abstractmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """What one layer costs at ``context`` tokens."""

    @classmethod
    @abstractmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """Tokens that one layer's output can depend on, the current one included; None is without limit."""

    @classmethod
    def advice(cls, config: ModelConfig) -> str:
        """What to change so that one layer reaches further; empty where it reaches everything."""
        return ""

    def trace(self, x_BTD: Tensor, state: MixerState | None = None) -> MixerTrace:
        """What `forward` does at each token, for people to look at: it costs more than the forward pass. A mixer of one path says that one."""
        return MixerTrace(paths={"mixer": self.forward(x_BTD, state)[0]})

    def slots(self) -> Mapping[str, Slots]:
        """The learned slots by memory; empty where the mixer has none."""
        return {}

    def initial_memory(self) -> Mapping[str, nn.Parameter]:
        """What a memory holds before the first token, by the parameter's name in this module; empty where it starts with nothing learned."""
        return {}

    def silence(self, memory: str, slot: int | None) -> None:
        """Take a slot out of every read and write, as if it were not there; None puts all slots of that memory back.

        Raises KeyError where there is no such memory.
        """
        raise KeyError(memory)


def start_std(config: ModelConfig, inputs: int) -> float:
    """Standard deviation that a matrix or an embedding of ``inputs`` columns starts with, unless ``config.initialization`` is the paper's."""
    return inputs**-0.5 if config.initialization == "fan_in" else INIT_STD


def step_bias(like: Tensor) -> Tensor:
    """Biases of the shape of ``like`` whose softplus, the step size, is log-uniform over `STEP_RANGE`."""
    low, high = (math.log(x) for x in STEP_RANGE)
    step = torch.empty_like(like).uniform_(low, high).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


def init_linear(linear: nn.Linear, config: ModelConfig, *, residual: int = 0) -> None:
    """Weight and bias by ``config.initialization``: PyTorch's own under "paper", else N(0, `start_std`) and 0.

    A projection into the residual stream, to which every layer adds ``residual`` times, starts smaller by √(residual · layers), so that the stream's
    variance does not grow with depth.
    """
    if config.initialization == "paper":
        linear.reset_parameters()
        return
    nn.init.normal_(linear.weight, std=start_std(config, linear.in_features) / math.sqrt(max(1, residual * config.num_hidden_layers)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def residual_branches(config: ModelConfig, options: MixerOptions) -> int:
    """How often a layer whose mixer has ``options`` adds to the residual stream: once, and once more by its feed-forward network."""
    return 1 + (config.feed_forward_size(options) > 0)
