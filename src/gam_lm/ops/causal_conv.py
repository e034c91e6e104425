"""The local path: a causal depthwise convolution over time.

Written as one shifted multiply-add per tap: for a handful of taps this reads the input once per tap
from cache, where the general convolution kernels spend most of a training step on the backward pass.

Shapes: B rows, T tokens, C channels, K taps (the last tap sees the current token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gam_lm.ops.segments import Segments


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    state_BJC: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_k weight_k ∘ x_{t−K+1+k}, the tokens before a sequence's first being 0.

    Args:
        x_BTC: input.
        weight_CK: one filter per channel.
        bias_C: added to every output, or None.
        state_BJC: the J = K − 1 inputs before x, or None at the start of a sequence.
        segments: several sequences in a row, padding; None is one sequence without padding.

    Returns:
        The output (B, T, C), which is ``bias`` or finite at padding, and the last J inputs (B, J, C) as the new state.
    """
    B, T, C = x_BTC.shape
    J = weight_CK.shape[1] - 1
    if segments is None:
        window_BSC = torch.cat([x_BTC.new_zeros(B, J, C) if state_BJC is None else state_BJC, x_BTC], 1)
        return _taps(window_BSC, weight_CK, bias_C, T), _last(window_BSC, T)
    packed = _packed(x_BTC, J, state_BJC, segments)
    y_BTC = _taps(packed.window_BSC, weight_CK, bias_C, T, packed.index_BS)
    y_BTC = y_BTC.gather(1, packed.order_BT.argsort(1)[..., None].expand(B, T, C))
    return y_BTC, _last_packed(packed, J, segments)


def last_inputs(x_BTC: Tensor, J: int, state_BJC: Tensor | None = None, segments: Segments | None = None) -> Tensor:
    """The state that `causal_conv` of J + 1 taps leaves (B, J, C), without its output."""
    B, T, C = x_BTC.shape
    if segments is None:
        return _last(torch.cat([x_BTC.new_zeros(B, J, C) if state_BJC is None else state_BJC, x_BTC[:, max(0, T - J) :]], 1), min(T, J))
    return _last_packed(_packed(x_BTC, J, state_BJC, segments), J, segments)


class _Packed(NamedTuple):
    """A row whose real tokens were moved to the front, so that the taps see past padding as if it were not there."""

    window_BSC: Tensor
    """The inputs before, and the moved ones (B, J + T, C)."""
    index_BS: Tensor
    """The sequence that each belongs to."""
    order_BT: Tensor
    """Where each moved token stood."""


def _packed(x_BTC: Tensor, J: int, state_BJC: Tensor | None, segments: Segments) -> _Packed:
    B, T, C = x_BTC.shape
    order_BT = (~segments.real_BT).long().argsort(dim=1, stable=True)
    front_BTC = x_BTC.gather(1, order_BT[..., None].expand(B, T, C))
    index_BT = segments.index_BT.gather(1, order_BT)
    before_BJC = x_BTC.new_zeros(B, J, C) if state_BJC is None else state_BJC
    return _Packed(torch.cat([before_BJC, front_BTC], 1), torch.cat([index_BT.new_zeros(B, J), index_BT], 1), order_BT)


def _last(window_BSC: Tensor, T: int) -> Tensor:
    # A copy: a view would hold on to all T tokens, and its strides, which tell T, would make a compiled step of decoding another one.
    return window_BSC[:, T:].clone(memory_format=torch.contiguous_format)


def _last_packed(packed: _Packed, J: int, segments: Segments) -> Tensor:
    """The last J inputs of the sequence that each row ends with, zeros where it has fewer."""
    kept_BJ = segments.real_BT.sum(1)[:, None] + torch.arange(J, device=packed.window_BSC.device)
    state_BJC = packed.window_BSC.gather(1, kept_BJ[..., None].expand(-1, -1, packed.window_BSC.shape[-1]))
    same_BJ = packed.index_BS.gather(1, kept_BJ) == segments.last_index_B[:, None]
    return torch.where(same_BJ[..., None], state_BJC, 0)


def _taps(window_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, T: int, index_BS: Tensor | None = None) -> Tensor:
    """The T outputs of a window of K − 1 + T inputs; with ``index_BS``, inputs of another sequence count as 0."""
    K = weight_CK.shape[1]
    y_BTC = window_BSC[:, K - 1 :] * weight_CK[:, K - 1]
    if bias_C is not None:
        y_BTC = y_BTC + bias_C
    for k in range(K - 1):
        x_BTC = window_BSC[:, k : k + T]
        if index_BS is not None:
            same_BT = index_BS[:, k : k + T] == index_BS[:, K - 1 :]
            x_BTC = torch.where(same_BT[..., None], x_BTC, 0)
        y_BTC = torch.addcmul(y_BTC, x_BTC, weight_CK[:, k])
    return y_BTC


def naive_causal_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """The same as a sum over taps, token by token, for tests."""
    y = torch.zeros_like(x_BTC)
    K = weight_CK.shape[1]
    for t in range(x_BTC.shape[1]):
        for k in range(K):
            if (before := t - K + 1 + k) >= 0:
                y[:, t] = y[:, t] + weight_CK[:, k] * x_BTC[:, before]
    return y if bias_C is None else y + bias_C
