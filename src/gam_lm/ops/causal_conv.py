"""The local path: a causal depthwise convolution over time.

Written as one shifted multiply-add per tap: for a handful of taps this reads the input once per tap
from cache, where the general convolution kernels spend most of a training step on the backward pass.

Shapes: B rows, T tokens, C channels, K taps (the last tap sees the current token).
"""

from __future__ import annotations

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
    if state_BJC is None:
        state_BJC = x_BTC.new_zeros(B, J, C)
    if segments is None:
        window_BSC = torch.cat([state_BJC, x_BTC], 1)
        # A copy: a view would hold on to all T tokens, and its strides, which tell T, would make a compiled step of decoding another one.
        return _taps(window_BSC, weight_CK, bias_C, T), window_BSC[:, T:].clone(memory_format=torch.contiguous_format)

    # Real tokens move to the front, so that the taps see past padding as if it were not there.
    order_BT = (~segments.real_BT).long().argsort(dim=1, stable=True)
    front_BTC = x_BTC.gather(1, order_BT[..., None].expand(B, T, C))
    index_BT = segments.index_BT.gather(1, order_BT)
    window_BSC = torch.cat([state_BJC, front_BTC], 1)
    window_index_BS = torch.cat([index_BT.new_zeros(B, J), index_BT], 1)

    y_BTC = _taps(window_BSC, weight_CK, bias_C, T, window_index_BS)
    y_BTC = y_BTC.gather(1, order_BT.argsort(1)[..., None].expand(B, T, C))

    kept_BJ = segments.real_BT.sum(1)[:, None] + torch.arange(J, device=x_BTC.device)
    new_state_BJC = window_BSC.gather(1, kept_BJ[..., None].expand(B, J, C))
    same_BJ = window_index_BS.gather(1, kept_BJ) == segments.last_index_B[:, None]
    return y_BTC, torch.where(same_BJ[..., None], new_state_BJC, 0)


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
