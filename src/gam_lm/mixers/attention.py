"""Causal self-attention, the baseline: softmax(q kᵀ / √E) v over the tokens so far, or over a window of them.

Shapes: B rows, T new tokens, S cached and new tokens, D = hidden_size, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers import key_value_cache
from gam_lm.mixers.attention_options import AttentionOptions
from gam_lm.mixers.base import Cost, Mixer, MixerState, init_linear, residual_branches
from gam_lm.mixers.convolution import CausalConv
from gam_lm.mixers.key_value_cache import attend, empty_cache
from gam_lm.ops.rotary import positions, rotate
from gam_lm.ops.segments import read_segments


def head_norm(x_BTHE: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """``norm`` of each head's queries or keys, in their format; without one, as they are."""
    # Under autocast PyTorch has no fused norm of bf16 by fp32, and warns.
    return x_BTHE if norm is None else F.rms_norm(x_BTHE, norm.normalized_shape, norm.weight.to(x_BTHE.dtype), norm.eps)


class Attention(Mixer):
    """Multi-head attention with a cache of keys and values.

    State: the cache (gam_lm.mixers.key_value_cache), which grows with every token by 8·D + 1 bytes a sequence in fp32, or with a window has a constant
    size; the last K − 1 inputs of the convolution (B, K − 1, 3·D), if there is one; with rotary positions the tokens counted so far (B,).
    """

    options_type = AttentionOptions
    options: AttentionOptions
    backends = ("sdpa", "materialised")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, options = config.hidden_size, self.options
        self.num_heads: int = options.num_heads or 1
        self.qkv_proj = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)
        self.conv = CausalConv(3 * D, options.conv_kernel_size) if options.conv_kernel_size else None
        self.q_norm, self.k_norm = (nn.RMSNorm(D // self.num_heads, config.layer_norm_eps) if options.qk_norm else None for _ in range(2))

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See `Mixer.forward`."""
        B, T, D = x_BTD.shape
        segments = None if segments_BT is None or not segments_BT.numel() else read_segments(segments_BT)
        cache, conv_state, count_B = self._parts(state)
        new: list[Tensor] = []
        qkv_BTX = self.qkv_proj(x_BTD)
        if self.conv is not None:
            added_BTX, conv_state = self.conv(qkv_BTX, conv_state, segments)
            qkv_BTX = qkv_BTX + added_BTX
            new.append(conv_state)
        q, k, v = qkv_BTX.view(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)
        q, k = head_norm(q, self.q_norm), head_norm(k, self.k_norm)
        if self.options.rotary:
            position_BT, count_B = positions(q, count_B, segments)
            q, k = rotate(q, position_BT), rotate(k, position_BT)
            new.append(count_B)
        y_BTHE, cache = attend(q, k, v, cache, window=self.options.window, segments=segments, fused=self.backend == "sdpa")
        return self.out_proj(y_BTHE.reshape(B, T, D)), (*cache, *new)

    def _parts(self, state: MixerState | None) -> tuple[MixerState | None, Tensor | None, Tensor | None]:
        """Cache, inputs of the convolution, and tokens counted, as far as there are such."""
        if state is None:
            return None, None, None
        parts = list(state)
        count_B = parts.pop() if self.options.rotary else None
        conv_state = parts.pop() if self.conv is not None else None
        return tuple(parts), conv_state, count_B

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`."""
        D = self.config.hidden_size
        yield self.qkv_proj.weight, (D, D, D)
        yield self.out_proj.weight, (D,)

    def filled_cache(
        self, batch_size: int, tokens: int, room: int, *, device: torch.device | str | None = None, dtype: torch.dtype
    ) -> MixerState | None:
        """See `Mixer.filled_cache`."""
        if self.options.window is not None:
            return None
        E = self.config.hidden_size // self.num_heads
        cache = key_value_cache.filled_cache(batch_size, tokens, room, self.num_heads, E, E, device=device, dtype=dtype)
        return (*cache, *self._besides(batch_size, tokens, device, dtype))

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """An empty cache."""
        E = self.config.hidden_size // self.num_heads
        cache = empty_cache(batch_size, self.num_heads, E, E, self.options.window, device=device, dtype=dtype)
        return (*cache, *self._besides(batch_size, 0, device, dtype))

    def _besides(self, batch_size: int, tokens: int, device: torch.device | str | None, dtype: torch.dtype | None) -> MixerState:
        J = self.options.conv_kernel_size - 1
        conv = (torch.zeros(batch_size, J, 3 * self.config.hidden_size, device=device, dtype=dtype),) if self.conv is not None else ()
        return (*conv, torch.full((batch_size,), tokens, device=device)) if self.options.rotary else conv

    def init_weights(self) -> None:
        """The projections by ``config.initialization``."""
        init_linear(self.qkv_proj, self.config)
        init_linear(self.out_proj, self.config, residual=residual_branches(self.config, self.options))
        if self.conv is not None:
            self.conv.init_weights()

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Grows with the context: a token meets (context + 1) / 2 tokens on average, all of them at the end. What is materialised is computed whole."""
        options = config.options_of(AttentionOptions)
        D, H, W, K = config.hidden_size, options.num_heads or 1, options.window, options.conv_kernel_size
        projections = 8 * D * D + 6 * D * K
        materialised = cls.backend_name(config) == "materialised"
        met = (context + 1) / 2 if W is None or context < W else W - W * (W - 1) / (2 * context)
        last = context + 1 if W is None else min(W, context + 1)
        scored = met if W is None else last + max(W, key_value_cache.BLOCK)  # a block of queries looks at a block and a window of keys
        computed = context if materialised and W is None else (met if W is None else min(scored, context))
        if W is None:
            kept: float = 5 * D + 3 * D * options.rotary
        else:  # keys and values are copied behind those of the cache, outputs put together; a block's mask is there as truth values and as numbers
            masked = min(max(W, key_value_cache.BLOCK), context) + W - 1
            kept = 5 * D + (D if options.rotary and not options.qk_norm else 3 * D) + 1.25 * masked
        kept += options.rotary * 2 * D // H + (K > 0) * 3 * D + options.qk_norm * (2 * D + 2 * H)
        return Cost(
            parameters=4 * D * D + 4 * D + (K > 0) * 3 * D * (K + 1) + options.qk_norm * 2 * D // H,
            forward_flops=projections + 4 * D * computed,
            decode_flops=projections + 4 * D * last,
            activations=kept + (H * computed if materialised else H),
            state_bytes=(context if W is None else W - 1) * (8 * D + 1) + 8 * options.rotary + (12 * D * (K - 1) if K else 0),
        )

    @classmethod
    def rule(cls, config: ModelConfig) -> str:
        """See `Mixer.rule`."""
        return "attention"

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """Everything before, or the window."""
        options = config.options_of(AttentionOptions)
        return None if options.window is None else options.window + max(0, options.conv_kernel_size - 1)

    @classmethod
    def advice(cls, config: ModelConfig) -> str:
        """See `Mixer.advice`."""
        window = config.options_of(AttentionOptions).window
        return "" if window is None else f"attention sees a window of {window} tokens; window=None sees all"
