"""Softmax attention in the place of GAM's memory: what a state that grows is worth inside the same block.

    g_t = Σ_{i ≤ t} softmax_i(τ r_t · a_i) v_i

with r and a as of the written memory (plain keys of at most length 1, a starting as the previous token), τ learned for each head, and the same norm, gate and
output projection around it.

Shapes: B rows, T tokens, D = hidden_size, H heads, M channels of a key, E = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers import key_value_cache
from gam_lm.mixers.addresses import Addresses
from gam_lm.mixers.base import Cost, init_linear, residual_branches
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.mixers.key_value_cache import attend, empty_cache
from gam_lm.ops.segments import Segments

TEMPERATURE = 8.0
"""τ at initialisation: a key of length 1 is told from others by scores between −τ and τ."""


class AttentionMemory(Addresses):
    """Keys and values of all tokens so far. State: the cache (gam_lm.mixers.key_value_cache), which grows by 4·(S + D) + 1 bytes a token in fp32."""

    def __init__(self, config: ModelConfig, options: GAMOptions) -> None:
        super().__init__(config, options)
        D = config.hidden_size
        self.temperature = nn.Parameter(torch.empty(self.num_heads))
        self.value_proj = nn.Linear(D, D, bias=False)
        self.norm = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(
        self, h_BTD: Tensor, gate_BTD: Tensor | None, conv_state: Tensor | None, state: tuple[Tensor, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of `gam_lm.mixers.written_memory.WrittenMemory.forward`."""
        read_BTHM, write_BTHM = self.addresses(h_BTD, conv_state, segments)
        value_BTHE = self.value_proj(h_BTD).unflatten(-1, (self.num_heads, -1))
        query_BTHM = (read_BTHM * self.temperature[:, None]).to(value_BTHE.dtype)
        g_BTHE, cache = attend(query_BTHM, write_BTHM.to(value_BTHE.dtype), value_BTHE, state, scale=1.0, segments=segments)
        g_BTD = F.rms_norm(g_BTHE, g_BTHE.shape[-1:], eps=self.config.layer_norm_eps).flatten(-2) * self.norm
        return self.out_proj(g_BTD if gate_BTD is None else gate_BTD * g_BTD), cache

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`."""
        yield from super().matrices()
        yield self.value_proj.weight, (self.config.hidden_size,)
        yield self.out_proj.weight, (self.config.hidden_size,)

    def _sizes(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_slots // self.num_heads, self.config.hidden_size // self.num_heads

    def initial_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """An empty cache."""
        return empty_cache(batch_size, *self._sizes(), None, device=device, dtype=dtype)

    def filled_cache(self, batch_size: int, tokens: int, room: int, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """See `Mixer.filled_cache`."""
        return key_value_cache.filled_cache(batch_size, tokens, room, *self._sizes(), device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Projections by ``config.initialization``."""
        self.init_addresses()
        nn.init.constant_(self.temperature, TEMPERATURE)
        init_linear(self.value_proj, self.config)
        nn.init.ones_(self.norm)
        init_linear(self.out_proj, self.config, residual=residual_branches(self.config, self.options))

    @classmethod
    def cost(cls, config: ModelConfig, options: GAMOptions, context: int) -> Cost:
        """What the memory adds to a layer: it grows with the context."""
        D, K, H, S = config.hidden_size, options.conv_kernel_size, options.num_heads or 1, options.num_memory_slots or config.hidden_size
        projections = 2 * (S * D + 2 * D * D + K * S)
        return Cost(
            parameters=S * D + S * (K + 1) + 2 * D * D + H + D,
            forward_flops=projections + (S + D) * (context + 1),
            decode_flops=projections + 2 * (K - 1) * S * D + 2 * (S + D) * (context + 1),
            activations=(6 + (options.gated_paths > 0)) * D + 8 * S + 5 * H,
            state_bytes=context * (4 * (S + D) + 1),
        )
