"""Rotary self-attention in the place of GAM's memory: the attention of the Llama block, inside GAM's.

    q, k, v = split(W h)                       q and k pass through an RMSNorm per head and are turned by their positions
    g_t     = Σ_{i ≤ t} softmax_i(q_t · k_i / √E) v_i

with the norm, gate and output projection of the written memory around it. gam_lm.mixers.attention_memory keeps GAM's keys instead, one projection for
reads and writes without positions: that swaps the memory alone, this swaps how it is addressed as well.

Shapes: B rows, T tokens, D = hidden_size, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers import key_value_cache
from gam_lm.mixers.attention import head_norm
from gam_lm.mixers.base import Cost, init_linear, residual_branches
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.mixers.key_value_cache import attend, empty_cache
from gam_lm.ops.rotary import positions, rotate
from gam_lm.ops.segments import Segments


class SelfAttentionMemory(nn.Module):
    """Keys and values of all tokens so far. State: the cache (gam_lm.mixers.key_value_cache), which grows by 8·D + 1 bytes a token in fp32,
    and the tokens counted so far (B,)."""

    def __init__(self, config: ModelConfig, options: GAMOptions) -> None:
        super().__init__()
        self.config, self.options = config, options
        D, H = config.hidden_size, options.num_heads or 1
        self.num_heads = H
        self.qkv_proj = nn.Linear(D, 3 * D, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(D // H, config.layer_norm_eps) for _ in range(2))
        self.norm = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(
        self, h_BTD: Tensor, gate_BTD: Tensor | None, conv_state: Tensor | None, state: tuple[Tensor, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of `gam_lm.mixers.written_memory.WrittenMemory.forward`, without a use for ``conv_state``."""
        *cache, count_B = state if state else (None,)
        q, k, v = self.qkv_proj(h_BTD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        position_BT, count_B = positions(h_BTD, count_B, segments)
        q, k = (rotate(head_norm(x, norm), position_BT) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        g_BTHE, new = attend(q, k, v, tuple(cache) or None, segments=segments)
        g_BTD = F.rms_norm(g_BTHE, g_BTHE.shape[-1:], eps=self.config.layer_norm_eps).flatten(-2) * self.norm
        return self.out_proj(g_BTD if gate_BTD is None else gate_BTD * g_BTD), (*new, count_B)

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`."""
        D = self.config.hidden_size
        yield self.qkv_proj.weight, (D, D, D)
        yield self.out_proj.weight, (D,)

    def _sizes(self) -> tuple[int, int, int]:
        E = self.config.hidden_size // self.num_heads
        return self.num_heads, E, E

    def initial_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """An empty cache, no token counted."""
        cache = empty_cache(batch_size, *self._sizes(), None, device=device, dtype=dtype)
        return (*cache, torch.zeros(batch_size, dtype=torch.long, device=device))

    def filled_cache(self, batch_size: int, tokens: int, room: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """See `Mixer.filled_cache`."""
        cache = key_value_cache.filled_cache(batch_size, tokens, room, *self._sizes(), device=device, dtype=dtype)
        return (*cache, torch.full((batch_size,), tokens, device=device))

    def init_weights(self) -> None:
        """Projections by ``config.initialization``; nothing is scaled by the norms."""
        init_linear(self.qkv_proj, self.config)
        for norm in (self.q_norm, self.k_norm):
            nn.init.ones_(norm.weight)
        nn.init.ones_(self.norm)
        init_linear(self.out_proj, self.config, residual=residual_branches(self.config, self.options))

    @classmethod
    def cost(cls, config: ModelConfig, options: GAMOptions, context: int) -> Cost:
        """What the memory adds to a layer: it grows with the context."""
        D, H = config.hidden_size, options.num_heads or 1
        projections = 8 * D * D
        return Cost(
            parameters=4 * D * D + 2 * D // H + D,
            forward_flops=projections + 2 * D * (context + 1),
            decode_flops=projections + 4 * D * (context + 1),
            activations=(10 + (options.gated_paths > 0)) * D + 5 * H,
            state_bytes=context * (8 * D + 1) + 8,
        )
