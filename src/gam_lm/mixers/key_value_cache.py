"""Softmax attention with a cache of keys and values: over all tokens so far, or over a window, with which the cache has a constant size.

A cache is keys (B, S, H, M), values (B, S, H, E), and whether a cached token belongs to the sequence that the row ends with (B, S). Without a window S
grows with every token; with a window of W it is W − 1 from the start. A fourth tensor, the place of the next token (1,), marks a cache with room that is
written in place (see `Mixer.filled_cache`).

Shapes: B rows, T new tokens, L cached tokens, S = L + T, H heads, M channels of a key, E of a value.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_lm.ops.segments import Segments

Cache = tuple[Tensor, ...]

IN_PLACE = 4
"""Tensors of a cache that is written in place."""

BLOCK = 64
"""Queries that look through a window at once, at least."""


def empty_cache(
    batch_size: int, heads: int, key_size: int, value_size: int, window: int | None, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> Cache:
    """The cache before the first token."""
    L = 0 if window is None else window - 1
    keys, values = (torch.zeros(batch_size, L, heads, size, device=device, dtype=dtype) for size in (key_size, value_size))
    return keys, values, torch.zeros(batch_size, L, dtype=torch.bool, device=device)


def filled_cache(
    batch_size: int, tokens: int, room: int, heads: int, key_size: int, value_size: int, *, device: torch.device | str | None, dtype: torch.dtype
) -> Cache:
    """A cache of random numbers after ``tokens`` tokens that is written in place, with room for more."""
    S = tokens + room
    keys, values = (torch.randn(batch_size, S, heads, size, device=device, dtype=dtype) for size in (key_size, value_size))
    own_BS = (torch.arange(S, device=device) < tokens).repeat(batch_size, 1)
    return keys, values, own_BS, torch.full((1,), tokens, device=device)


def attend(
    q_BTHM: Tensor,
    k_BTHM: Tensor,
    v_BTHE: Tensor,
    cache: Cache | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    segments: Segments | None = None,
    fused: bool = True,
) -> tuple[Tensor, Cache]:
    """softmax(scale · q kᵀ) v of each new token over the tokens of its sequence so far.

    Args:
        q_BTHM: queries.
        k_BTHM: keys of the same tokens.
        v_BTHE: their values.
        cache: of the tokens before; None starts the sequences.
        scale: of the scores; None is 1/√M.
        window: tokens that a token sees, itself included; None is all.
        segments: sequences and padding of the rows.
        fused: PyTorch's kernels, or scores that are held whole.

    Returns:
        (B, T, H, E), and the cache after the last token.
    """
    if cache is not None and len(cache) == IN_PLACE and q_BTHM.shape[1] == 1 and segments is None:
        return _one_in_place(q_BTHM, k_BTHM, v_BTHE, cache, scale, fused)
    if window is not None:
        return _attend_window(q_BTHM, k_BTHM, v_BTHE, cache, scale, window, segments, fused)
    B, T = q_BTHM.shape[:2]
    if cache is None and segments is None:
        own_BS = torch.ones(B, T, dtype=torch.bool, device=q_BTHM.device)
        return _attention(q_BTHM, k_BTHM, v_BTHE, None, scale, fused), (k_BTHM, v_BTHE, own_BS)
    if cache is None:
        cached_own_BL = torch.empty(B, 0, dtype=torch.bool, device=q_BTHM.device)
    else:
        cached_k, cached_v, cached_own_BL = cache[:3]
        k_BTHM, v_BTHE = torch.cat([cached_k.to(k_BTHM.dtype), k_BTHM], 1), torch.cat([cached_v.to(v_BTHE.dtype), v_BTHE], 1)
    mask_B1TS, own_BS = visible(cached_own_BL, T, segments)
    return _attention(q_BTHM, k_BTHM, v_BTHE, mask_B1TS, scale, fused), (k_BTHM, v_BTHE, own_BS)


def _attention(q_BTHM: Tensor, k_BSHM: Tensor, v_BSHE: Tensor, mask_B1TS: Tensor | None, scale: float | None, fused: bool) -> Tensor:
    """Attention of the new tokens over all; without a mask, causal over the new tokens alone."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHM, k_BSHM, v_BSHE))
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS, is_causal=mask_B1TS is None, scale=scale).transpose(1, 2)
    if mask_B1TS is None:
        T = q.shape[2]
        mask_B1TS = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores_BHTS = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores_BHTS.masked_fill(~mask_B1TS, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _attend_window(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, scale: float | None, window: int, segments: Segments | None, fused: bool
) -> tuple[Tensor, Cache]:
    """Blocks of queries, each over its own window of keys: time and memory grow with T, not with T²."""
    B, T, H, M = q.shape
    L = window - 1
    if cache is None:
        cache = empty_cache(B, H, M, v.shape[-1], window, device=q.device, dtype=k.dtype)
    order_BT = None
    if segments is None:
        index_BT = torch.zeros(B, T, dtype=torch.long, device=q.device)
        real_BT = torch.ones(B, T, dtype=torch.bool, device=q.device)
    else:  # real tokens move to the front: the distance of two columns is then that of two tokens
        order_BT = (~segments.real_BT).long().argsort(dim=1, stable=True)
        q, k, v = (_reordered(each, order_BT) for each in (q, k, v))
        real_BT, index_BT = segments.real_BT.gather(1, order_BT), segments.index_BT.gather(1, order_BT)
    k, v = torch.cat([cache[0].to(k.dtype), k], 1), torch.cat([cache[1].to(v.dtype), v], 1)
    own_BS = torch.cat([cache[2], real_BT], 1)
    index_BS = torch.cat([index_BT.new_zeros(B, L), index_BT], 1)
    block = max(window, BLOCK)
    outputs = []
    for start in range(0, max(T, 1), block):
        n = min(block, T - start)
        seen = slice(start, start + n + L)
        apart_XS = torch.arange(n, device=q.device)[:, None] + L - torch.arange(n + L, device=q.device)
        mask_BXS = (apart_XS >= 0) & (apart_XS <= L) & own_BS[:, None, seen] & (index_BT[:, start : start + n, None] == index_BS[:, None, seen])
        mask_BXS = mask_BXS | (apart_XS == 0)  # padding looks at itself alone, so that its softmax is finite
        outputs.append(_attention(q[:, start : start + n], k[:, seen], v[:, seen], mask_BXS[:, None], scale, fused))
    y = torch.cat(outputs, 1)
    if segments is None or order_BT is None:
        own = own_BS[:, T:]
        kept = (k[:, T:], v[:, T:])
    else:
        y = _reordered(y, order_BT.argsort(1))
        place_BL = segments.real_BT.sum(1)[:, None] + torch.arange(L, device=q.device)
        kept = (_reordered(k, place_BL), _reordered(v, place_BL))
        own = own_BS.gather(1, place_BL) & (index_BS.gather(1, place_BL) == segments.last_index_B[:, None])
    # Copies of one layout: a view would hold on to all tokens, and another layout is another program for a compiled step.
    return y, tuple(each.clone(memory_format=torch.contiguous_format) for each in (*kept, own))


def _reordered(x_BTHE: Tensor, place_BX: Tensor) -> Tensor:
    """The tokens at ``place_BX`` of each row."""
    return x_BTHE.gather(1, place_BX[..., None, None].expand(*place_BX.shape, *x_BTHE.shape[2:]))


def _one_in_place(q: Tensor, k: Tensor, v: Tensor, cache: Cache, scale: float | None, fused: bool) -> tuple[Tensor, Cache]:
    """One token with a cache that has room for it; the cache itself is changed."""
    keys_BSHM, values_BSHE, own_BS, place_1 = cache
    keys_BSHM.index_copy_(1, place_1, k.to(keys_BSHM.dtype))
    values_BSHE.index_copy_(1, place_1, v.to(values_BSHE.dtype))
    own_BS.index_fill_(1, place_1, True)
    cache = (keys_BSHM, values_BSHE, own_BS, place_1 + 1)
    if fused and q.device.type == "cpu" and torch.compiler.is_compiling():
        return attend_one(q, keys_BSHM, values_BSHE, own_BS, scale), cache
    return _attention(q, keys_BSHM.to(q.dtype), values_BSHE.to(q.dtype), own_BS[:, None, None], scale, fused), cache


def attend_one(q_B1HM: Tensor, k_BSHM: Tensor, v_BSHE: Tensor, own_BS: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one token over a cache, as products that a compiler fuses with their sums and reads the cache once.

    PyTorch's attention kernel for CPUs is built for many queries: with one in bf16 it takes ten times as long as this does when compiled (``docs/log.md``).

    Returns:
        (B, 1, H, E), in the format of the query.
    """
    wide = torch.promote_types(q_B1HM.dtype, torch.float32)
    scores_BSH = (q_B1HM * k_BSHM).sum(-1, dtype=wide) * (1 / math.sqrt(q_B1HM.shape[-1]) if scale is None else scale)
    share_BSH1 = scores_BSH.masked_fill(~own_BS[:, :, None], -torch.inf).softmax(1)[..., None]
    return (share_BSH1 * v_BSHE).sum(1, keepdim=True).to(q_B1HM.dtype)


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
