"""Causal self-attention, the baseline: softmax(q kᵀ / √E) v over the tokens so far.

Shapes: B rows, T new tokens, L cached tokens, S = L + T, D = hidden_size, H heads, E = D / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import Cost, Mixer, MixerState, init_linear
from gam_lm.ops.segments import Segments, positions_within, read_segments

ROTARY_BASE = 10_000.0

IN_PLACE = 5
"""Tensors of a state whose cache is written in place: keys, values, own, tokens counted, and the place of the next one (1,)."""


def rotate(x_BHTE: Tensor, position_BT: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864): turn each pair of channels by an angle that grows with the position.

    Args:
        x_BHTE: queries or keys; channel i is paired with channel i + E/2.
        position_BT: place of each token in its sequence.
    """
    half = x_BHTE.shape[-1] // 2
    dtype = torch.promote_types(x_BHTE.dtype, torch.float32)  # angles of thousands of radians need it
    frequency_E = ROTARY_BASE ** (-torch.arange(half, device=x_BHTE.device, dtype=dtype) / half)
    angle_B1TE = position_BT[:, None, :, None].to(dtype) * frequency_E
    cos, sin = angle_B1TE.cos(), angle_B1TE.sin()
    first, second = x_BHTE[..., :half].to(dtype), x_BHTE[..., half:].to(dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x_BHTE.dtype)


class Attention(Mixer):
    """Multi-head attention with a cache of keys and values.

    ``backend`` is "sdpa" (PyTorch's fused kernels, "auto" as well) or "materialised", which holds the T × T scores
    as the paper's baseline does. State: keys (B, S, H, E), values (B, S, H, E), and whether a cached token belongs to the
    sequence that the row ends with (B, S): it grows with every token, by 8·D + 1 bytes a sequence in fp32. A mixer of rotary
    positions also keeps the tokens counted so far (B,). The state of :meth:`filled_cache` does not grow: the next tokens go into its room, in place.
    """

    uses = frozenset({"num_attention_heads"})
    backends = ("sdpa", "materialised")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.rotary = config.positions == "rotary"
        self.qkv_proj = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """See :meth:`Mixer.forward`."""
        B, T, D = x_BTD.shape
        segments = None if segments_BT is None else read_segments(segments_BT)
        q, k, v = self.qkv_proj(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)

        count_B: tuple[Tensor, ...] = ()
        if self.rotary:
            before_B = x_BTD.new_zeros(B, dtype=torch.long) if state is None else state[3]
            q, k, count_B = self._rotate(q, k, before_B, segments)
        if state is not None and len(state) == IN_PLACE and T == 1 and segments is None:
            y_BHTE, state = self._one_in_place(q, k, v, state)
            return self.out_proj(y_BHTE.transpose(1, 2).reshape(B, T, D)), state

        if state is None and segments is None:
            y_BHTE = self._attend(q, k, v, None)
            own_BS = torch.ones(B, T, dtype=torch.bool, device=x_BTD.device)
        else:
            cached_k, cached_v, cached_own_BL = state[:3] if state is not None else self.initial_state(B, device=x_BTD.device, dtype=k.dtype)[:3]
            mask_B1TS, own_BS = visible(cached_own_BL, T, segments)
            k, v = torch.cat([cached_k.to(k.dtype), k], 1), torch.cat([cached_v.to(v.dtype), v], 1)
            y_BHTE = self._attend(q, k, v, mask_B1TS)
        return self.out_proj(y_BHTE.transpose(1, 2).reshape(B, T, D)), (k, v, own_BS, *count_B)

    @staticmethod
    def _rotate(q: Tensor, k: Tensor, before_B: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor, tuple[Tensor]]:
        T = q.shape[1]
        if segments is None:
            position_BT = before_B[:, None] + torch.arange(T, device=q.device)
            count_B = before_B + T
        else:
            position_BT, count_B = positions_within(segments, before_B)
        q, k = (rotate(x.transpose(1, 2), position_BT).transpose(1, 2) for x in (q, k))
        return q, k, (count_B,)

    def _attend(self, q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask_B1TS: Tensor | None) -> Tensor:
        """Attention of the new tokens over all; without a mask, causal over the new tokens alone."""
        q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSHE, v_BSHE))
        if self.backend == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS, is_causal=mask_B1TS is None)
        if mask_B1TS is None:
            T = q.shape[2]
            mask_B1TS = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores_BHTS = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        return scores_BHTS.masked_fill(~mask_B1TS, -torch.inf).softmax(-1) @ v

    def _one_in_place(self, q: Tensor, k: Tensor, v: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One token with a cache that has room for it; the cache itself is changed."""
        keys_BSHE, values_BSHE, own_BS, count_B, place_1 = state
        keys_BSHE.index_copy_(1, place_1, k.to(keys_BSHE.dtype))
        values_BSHE.index_copy_(1, place_1, v.to(values_BSHE.dtype))
        own_BS.index_fill_(1, place_1, True)
        state = (keys_BSHE, values_BSHE, own_BS, count_B + 1, place_1 + 1)
        if self.backend == "sdpa" and q.device.type == "cpu" and torch.compiler.is_compiling():
            return attend_one(q, keys_BSHE, values_BSHE, own_BS), state
        return self._attend(q, keys_BSHE.to(q.dtype), values_BSHE.to(q.dtype), own_BS[:, None, None]), state

    def filled_cache(self, batch_size: int, tokens: int, room: int, *, device: torch.device | str | None = None, dtype: torch.dtype) -> MixerState:
        """See :meth:`Mixer.filled_cache`."""
        S = tokens + room
        keys, values = (torch.randn(batch_size, S, self.num_heads, self.config.head_size, device=device, dtype=dtype) for _ in range(2))
        own_BS = (torch.arange(S, device=device) < tokens).repeat(batch_size, 1)
        count_B = torch.full((batch_size,), tokens, device=device)
        return keys, values, own_BS, count_B, count_B[:1].clone()

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """An empty cache."""
        empty = torch.empty(batch_size, 0, self.num_heads, self.config.head_size, device=device, dtype=dtype)
        own_BL = torch.empty(batch_size, 0, dtype=torch.bool, device=device)
        count_B = (torch.zeros(batch_size, dtype=torch.long, device=device),) if self.rotary else ()
        return (empty, empty.clone(), own_BL, *count_B)

    def init_weights(self) -> None:
        """The projections by ``config.initialization``."""
        init_linear(self.qkv_proj, self.config)
        init_linear(self.out_proj, self.config, residual=True)

    @classmethod
    def cost(cls, config: ModelConfig, context: int) -> Cost:
        """Grows with the context: a token meets (context + 1) / 2 tokens on average, all of them at the end. What is materialised is computed whole."""
        D, H = config.hidden_size, config.num_attention_heads
        projections = 8 * D * D
        materialised, rotary = cls.backend_name(config) == "materialised", config.positions == "rotary"
        return Cost(
            parameters=4 * D * D + 4 * D,
            forward_flops=projections + (4 * D * context if materialised else 2 * D * (context + 1)),
            decode_flops=projections + 4 * D * (context + 1),
            activations=5 * D + rotary * (3 * D + 2 * D // H) + (H * context if materialised else H),
            state_bytes=context * (8 * D + 1) + 8 * rotary,
        )

    @classmethod
    def reach(cls, config: ModelConfig) -> int | None:
        """Everything before."""
        return None


def attend_one(q_B1HE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, own_BS: Tensor) -> Tensor:
    """Attention of one token over a cache, as products that a compiler fuses with their sums and reads the cache once.

    PyTorch's attention kernel for CPUs is built for many queries: with one in bf16 it takes ten times as long as this does when compiled (``docs/log.md``).

    Returns:
        (B, H, 1, E), in the format of the query.
    """
    wide = torch.promote_types(q_B1HE.dtype, torch.float32)
    scores_BSH = (q_B1HE * k_BSHE).sum(-1, dtype=wide) / math.sqrt(q_B1HE.shape[-1])
    share_BSH1 = scores_BSH.masked_fill(~own_BS[:, :, None], -torch.inf).softmax(1)[..., None]
    return (share_BSH1 * v_BSHE).sum(1, keepdim=True).to(q_B1HE.dtype).transpose(1, 2)


def visible(own_BL: Tensor, T: int, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Which token may look at which.

    Args:
        own_BL: whether a cached token belongs to the sequence that is being continued.
        T: number of new tokens.
        segments: of the new tokens.

    Returns:
        The mask (B, 1, T, L + T), and whether each of the L + T tokens belongs to the sequence that the row ends with (B, L + T).
        Padding looks at itself alone, so that its softmax is finite.
    """
    B = own_BL.shape[0]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=own_BL.device).tril()
    if segments is None:
        mask_BTS = torch.cat([own_BL[:, None].expand(B, T, -1), causal_TT.expand(B, T, T)], 2)
        return mask_BTS[:, None], torch.cat([own_BL, own_BL.new_ones(B, T)], 1)
    real_BT, index_BT = segments
    same_BTT = index_BT[:, :, None] == index_BT[:, None, :]
    new_BTT = causal_TT & same_BTT & real_BT[:, None, :] | torch.eye(T, dtype=torch.bool, device=own_BL.device)
    old_BTL = own_BL[:, None] & (real_BT & (index_BT == 0))[..., None]
    last_B1 = segments.last_index_B[:, None]
    own_BS = torch.cat([own_BL & (last_B1 == 0), real_BT & (index_BT == last_B1)], 1)
    return torch.cat([old_BTL, new_BTT], 2)[:, None], own_BS
