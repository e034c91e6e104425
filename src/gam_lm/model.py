"""A language model is a stack of blocks around interchangeable token mixers.

    x = embed(tokens) [+ learned positions]
    x = x + mixer(norm(x));  x = x + FFN(norm(x))        once per block
    logits = norm(x) Eᵀ                                   E is the token embedding, when tied

Shapes: B rows, T tokens, D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.base import MixerState, init_linear, start_std
from gam_lm.mixers.registry import mixer_class
from gam_lm.ops.cross_entropy import cross_entropy, linear_cross_entropy
from gam_lm.ops.segments import positions_within, read_segments


class State(NamedTuple):
    """What a model carries from token to token: tensors only, the batch first."""

    position_B: Tensor
    """Tokens that each row's sequence has so far."""
    layers: tuple[MixerState, ...]
    """The state of every block's mixer."""


class FeedForward(nn.Module):
    """The per-token part of a block: Linear, GELU (exact), Linear; or, as SwiGLU, SiLU(W_g x) ∘ W_u x, Linear, without biases (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, kind: str) -> None:
        super().__init__()
        bias = kind == "gelu"
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.gate_proj = None if bias else nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply to every token."""
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x_BTD)))
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def make_norm(config: ModelConfig) -> nn.Module:
    """A LayerNorm or RMSNorm of the residual stream."""
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.hidden_size, config.layer_norm_eps)


class Block(nn.Module):
    """A mixer and a feed-forward network, each behind a norm and beside a residual; in a bare stack the mixer alone."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = None if config.stack == "bare" else make_norm(config)
        self.mixer = mixer_class(mixer)(config)
        inner = config.feed_forward_size(self.mixer.options)
        self.mlp_norm = make_norm(config) if inner else None
        self.mlp = FeedForward(config.hidden_size, inner, config.mlp) if inner else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, state: MixerState | None, segments_BT: Tensor | None) -> tuple[Tensor, MixerState]:
        """One block; the state as in `Mixer.forward`."""
        if self.mixer_norm is None:
            return self.mixer(x_BTD, state, segments_BT=segments_BT)
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD), state, segments_BT=segments_BT)
        x_BTD = x_BTD + y_BTD
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD, state


class Backbone(nn.Module):
    """Embedding, blocks and last norm: everything but the output head.

    It has no constructor of its own, so that it also serves as the body of a class whose base class has one: call `build` in yours.
    """

    config: ModelConfig

    def build(self, config: ModelConfig) -> None:
        """Make the parts, without initial values. Raises InputError where the config names an unknown mixer."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.longest, config.hidden_size) if config.longest else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Sequence[Block] = nn.ModuleList(Block(config, mixer) for mixer in config.layer_mixers)  # type: ignore[assignment]
        self.norm = make_norm(config)

    def hidden(self, tokens_BT: Tensor, state: State | None = None, segments_BT: Tensor | None = None) -> tuple[Tensor, State]:
        """What the output head reads (B, T, D), and the state after the last token; see `LanguageModel.stream`."""
        self.check_ids(tokens_BT)
        return self.mix(self.embed_tokens(tokens_BT), state, segments_BT)

    def mix(
        self, x_BTD: Tensor, state: State | None = None, segments_BT: Tensor | None = None, *, recompute: Callable[..., Any] | None = None
    ) -> tuple[Tensor, State]:
        """`hidden` of tokens that are embedded already; ``recompute`` (torch.utils.checkpoint.checkpoint) trades activations for time."""
        B, T, _ = x_BTD.shape
        segments_BT = segments_BT if T else None
        before_B = torch.zeros(B, dtype=torch.long, device=x_BTD.device) if state is None else state.position_B
        if segments_BT is None:
            position_BT, after_B = before_B[:, None] + torch.arange(T, device=x_BTD.device), before_B + T
        else:
            position_BT, after_B = positions_within(read_segments(segments_BT), before_B)
        if self.embed_positions is not None:
            self._check_positions(T, position_BT)
            x_BTD = x_BTD + self.embed_positions(position_BT)
        x_BTD = self.dropout(x_BTD)
        states = []
        for i, layer in enumerate(self.layers):
            before = None if state is None else state.layers[i]
            x_BTD, layer_state = layer(x_BTD, before, segments_BT) if recompute is None else recompute(layer, x_BTD, before, segments_BT)
            states.append(layer_state)
        return self.norm(x_BTD), State(after_B, tuple(states))

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token of ``batch_size`` rows, by default on the model's device in its dtype."""
        weight = self.embed_tokens.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        layers = tuple(layer.mixer.initial_state(batch_size, device=device, dtype=dtype) for layer in self.layers)
        return State(torch.zeros(batch_size, dtype=torch.long, device=device), layers)

    def draw_initial_values(self, head: nn.Linear | None) -> None:
        """Draw those of all parts and of the output head from torch's global generator, as ``config.initialization`` says."""
        config = self.config
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)):
            norm.reset_parameters()
        for layer in self.layers:
            layer.mixer.init_weights()
            if layer.mlp is not None:
                init_linear(layer.mlp.up_proj, config)
                if layer.mlp.gate_proj is not None:
                    init_linear(layer.mlp.gate_proj, config)
                init_linear(layer.mlp.down_proj, config, residual=2)
        if config.initialization == "paper":
            if self.embed_positions is not None:
                nn.init.normal_(self.embed_positions.weight)
            if not config.tie_word_embeddings:
                nn.init.normal_(self.embed_tokens.weight)
            # The tie runs head → embedding: the shared weight keeps the Linear's U(±1/√D).
            bound = 1 / math.sqrt(config.hidden_size)
            if head is not None or config.tie_word_embeddings:
                nn.init.uniform_((head or self.embed_tokens).weight, -bound, bound)
        else:
            for part in (self.embed_tokens, self.embed_positions, head):
                if part is not None:
                    nn.init.normal_(part.weight, std=start_std(config, config.hidden_size))

    def check_ids(self, tokens_BT: Tensor) -> None:
        """Raise InputError for an id outside the vocabulary; on another device than a CPU nothing is looked at."""
        if torch.compiler.is_compiling() or tokens_BT.device.type != "cpu" or not tokens_BT.numel():
            return  # the look would wait for the device, whose own assertion stands
        low, high = (int(x) for x in tokens_BT.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"tokens hold the id {low if low < 0 else high}: vocab_size is {self.config.vocab_size}, use the tokenizer that the model was trained with"
            )

    def _check_positions(self, T: int, position_BT: Tensor) -> None:
        if torch.compiler.is_compiling() or self.config.longest is None:
            return
        known = position_BT.device.type == "cpu" and position_BT.numel()  # elsewhere the look would wait for the device
        self.config.check_length("the sequence's length", int(position_BT.max()) + 1 if known else T)


class LanguageModel(Backbone):
    """A causal language model with the mixers that ``config`` names.

    Raises InputError where the config names an unknown mixer. Built on the meta device, call `init_weights` after ``to_empty``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.build(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, segments: Tensor | None = None, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The paper's call.

        Args:
            tokens: ids (B, T).
            targets: the id that follows each token (B, T); −100 is not predicted.
            segments: ids of several sequences in a row, 0 for padding (B, T).
            return_logits: False spares the (B, T, V) logits, which are then never held whole.

        Returns:
            Logits (B, T, V) or None, and the mean cross-entropy in nats over the counted targets, or None without targets.

        Raises:
            InputError: for an id outside the vocabulary, or more tokens than learned positions.
        """
        h_BTD, _ = self.hidden(tokens, None, segments)
        flat_ND = h_BTD.reshape(-1, h_BTD.shape[-1])
        if return_logits:
            logits_BTV = self.lm_head(h_BTD)
            loss = None if targets is None else cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets.reshape(-1))
            return logits_BTV, loss
        return None, None if targets is None else linear_cross_entropy(flat_ND, self.lm_head.weight, targets.reshape(-1))

    def stream(self, tokens: Tensor, state: State | None = None, *, segments: Tensor | None = None) -> tuple[Tensor, State]:
        """Prefill and decode: any split of a sequence into calls gives what one call gives.

        Args:
            tokens: the next ids (B, T).
            state: what the last call returned; None starts the sequences.
            segments: as in `forward`; a row's first real token continues its state.

        Returns:
            Logits (B, T, V) and the state after the last token.
        """
        h_BTD, state = self.hidden(tokens, state, segments)
        return self.lm_head(h_BTD), state

    def init_weights(self) -> None:
        """Draw all initial values from torch's global generator, as ``config.initialization`` says."""
        if self.config.tie_word_embeddings:  # to_empty, on the way from the meta device, makes two of the one weight
            self.lm_head.weight = self.embed_tokens.weight
        self.draw_initial_values(self.lm_head)

    def count_parameters(self) -> int:
        """Number of parameters, the shared weight counted once."""
        return sum(p.numel() for p in self.parameters())


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model that ``config`` describes, without allocating it."""
    with torch.device("meta"):
        return LanguageModel(config).count_parameters()
