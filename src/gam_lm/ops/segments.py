"""Several sequences in one row, and padding.

A row of ``segments_BT`` names the sequence of every token: 0 is padding, and an id that differs
from that of the last real token before it starts a new sequence. Padding touches nothing: whatever
a mixer computes for the real tokens is what it would compute had the padding never been there.
The first real token of a row continues the mixer's state, if there is one.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """What the mixers need to know of ``segments_BT``."""

    real_BT: Tensor
    """bool: False at padding."""
    index_BT: Tensor
    """int64: the number of sequence starts in the row so far; 0 continues the state. At padding: that of the real token before."""

    @property
    def last_index_B(self) -> Tensor:
        """The index of the sequence that the row ends with, whose state is carried on."""
        return self.index_BT[:, -1]


def read_segments(segments_BT: Tensor) -> Segments:
    """Number the sequences of each row.

    Args:
        segments_BT: integer ids, 0 for padding.
    """
    real_BT = segments_BT != 0
    T = segments_BT.shape[1]
    place_BT = torch.arange(T, device=segments_BT.device).expand_as(segments_BT)
    latest_BT = torch.where(real_BT, place_BT, -1).cummax(1).values  # place of the latest real token up to t, or -1
    before_BT = torch.cat([latest_BT.new_full((len(latest_BT), 1), -1), latest_BT[:, :-1]], 1)
    previous_id_BT = segments_BT.gather(1, before_BT.clamp(min=0))
    starts_BT = real_BT & (before_BT >= 0) & (segments_BT != previous_id_BT)
    return Segments(real_BT, starts_BT.long().cumsum(1))


def positions_within(segments: Segments, offset_B: Tensor) -> tuple[Tensor, Tensor]:
    """Count the tokens of each sequence.

    Args:
        segments: of a row.
        offset_B: tokens that the continued sequence already had.

    Returns:
        The position of each token within its sequence (B, T), 0 at padding, and the tokens that the last sequence of each row has now (B,).
    """
    real, index = segments
    counted_BT = real.long().cumsum(1) - real.long()  # real tokens of the row before t
    changed_BT = torch.cat([torch.zeros_like(index[:, :1]), index[:, 1:] - index[:, :-1]], 1) > 0
    start_BT = torch.where(changed_BT, counted_BT, 0).cummax(1).values  # the same count where the token's sequence began
    own_BT = counted_BT - start_BT + torch.where(index == 0, offset_B[:, None], 0)
    last_B = own_BT[:, -1] + real[:, -1].long()
    return own_BT.where(real, 0), last_B  # padding needs no position, and may lie where there are none


class Packed(NamedTuple):
    """Rows laid end to end, B·T tokens, as the N sequences that stand in them: what kernels for rows of several sequences read. Shape N: one each."""

    cu_seqlens: Tensor
    """int64 (N + 1,): where each sequence begins, and the end of the last one."""
    row_N: Tensor
    """int64: the row it stands in."""
    continues_N: Tensor
    """bool: whether it goes on with the row's state."""
    last_B: Tensor
    """int64: the sequence that each row ends with."""


def pack(index_BT: Tensor) -> Packed:
    """The sequences of all rows.

    Args:
        index_BT: as of `Segments`. Their number is read back from the device.
    """
    T = index_BT.shape[1]
    begins_BT = torch.ones_like(index_BT, dtype=torch.bool)
    begins_BT[:, 1:] = index_BT[:, 1:] != index_BT[:, :-1]
    begin_N = begins_BT.flatten().nonzero()[:, 0]
    continues_N = index_BT.flatten()[begin_N] == 0
    cu_seqlens = torch.cat([begin_N, begin_N.new_full((1,), index_BT.numel())])
    return Packed(cu_seqlens, begin_N // T, continues_N, begins_BT.sum(1).cumsum(0) - 1)


def whole_rows(B: int, T: int, device: torch.device) -> Packed:
    """The same of rows that are one sequence each."""
    row_B = torch.arange(B, device=device)
    return Packed(torch.arange(B + 1, device=device) * T, row_B, torch.ones_like(row_B, dtype=torch.bool), row_B)
