"""Rotary positions (RoFormer, arXiv 2104.09864): each pair of channels is turned by an angle that grows with the position.

A score of a turned query and a turned key depends on how far apart the two are.

Shapes: B rows, T tokens, H heads, E channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_lm.ops.segments import Segments, positions_within

ROTARY_BASE = 10_000.0


def rotate(x_BTHE: Tensor, position_BT: Tensor) -> Tensor:
    """Turn queries or keys.

    Args:
        x_BTHE: channel i is paired with channel i + E/2.
        position_BT: place of each token in its sequence.
    """
    half = x_BTHE.shape[-1] // 2
    dtype = torch.promote_types(x_BTHE.dtype, torch.float32)  # angles of thousands of radians need it
    frequency_E = ROTARY_BASE ** (-torch.arange(half, device=x_BTHE.device, dtype=dtype) / half)
    angle_BT1E = position_BT[:, :, None, None].to(dtype) * frequency_E
    cos, sin = angle_BT1E.cos(), angle_BT1E.sin()
    first, second = x_BTHE[..., :half].to(dtype), x_BTHE[..., half:].to(dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x_BTHE.dtype)


def positions(x_BTX: Tensor, count_B: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Place of each token in its sequence (B, T), and the tokens of the sequence that each row ends with (B,).

    Args:
        x_BTX: anything of the same rows and tokens, on the same device.
        count_B: tokens before; None starts the sequences.
        segments: sequences and padding of the rows.
    """
    B, T = x_BTX.shape[:2]
    if count_B is None:
        count_B = torch.zeros(B, dtype=torch.long, device=x_BTX.device)
    if segments is None:
        return count_B[:, None] + torch.arange(T, device=x_BTX.device), count_B + T
    return positions_within(segments, count_B)
