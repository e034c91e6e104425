"""Context parallelism: every process holds a piece of each sequence, and one state is handed from piece to piece.

Over a piece of a sequence every memory that is written, and the window of a convolution, is an affine map of the state before the piece:

    S_out = A S_in + U          A, U from the piece's own tokens

so that processes compute (A, U) at the same time, gather them, and fold those before their own: S_in of piece r = A_{r−1} (… (A_0 0 + U_0) …) + U_{r−1}.
The gradient is the mirror image. With d_r = ∂loss/∂S_in of piece r through what the piece itself reads, the gradient of a piece's end is
E_r = d_{r+1} + A_{r+1}ᵀ E_{r+1}, whence dU_r = E_r and dA_r = E_r S_inᵀ. One collective a state forwards, one backwards.

    delta rule       A = Π_t λ_t (I − b_t a_t a_tᵀ)        columns of their own in the rule: value 0, bank 0, first state I
    mean rule        A = Π_t λ_t                           a number
    convolution      A = a shift by the piece's length     the last K − 1 inputs, right-aligned

This is the method of LASP-2 (arXiv 2502.07563) for decays, and of flash-linear-attention's context parallelism for the delta rule.

Shapes: P pieces, B rows, T tokens of a piece, H heads, M slots per head, E values per slot, J = K − 1 inputs before, C channels, X rows of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.ops.causal_conv import last_inputs
from gam_lm.ops.chunks import LEAST_LOG_DECAY
from gam_lm.ops.delta_rule import widest
from gam_lm.ops.first_derivative import refuse_second_derivative
from gam_lm.ops.segments import Segments, read_segments

Rule = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
"""delta_memory, one of its kernels, or mean_memory."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The processes that share each sequence: the process of rank r in ``group`` holds piece r, in the order of time."""

    group: Any
    """A torch.distributed process group."""

    @property
    def rank(self) -> int:
        """The piece that this process holds."""
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """Number of pieces."""
        return dist.get_world_size(self.group)

    def gather(self, own: Tensor) -> list[Tensor]:
        """The tensors of all pieces, all of one shape; no gradient passes."""
        found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(found, own.contiguous(), group=self.group)
        return found


# A global, not a ContextVar: the recomputation of activation checkpoints runs in autograd's threads, and compilers look through it.
_active: Pieces | None = None


@contextmanager
def pieces_held(pieces: Pieces | None) -> Iterator[None]:
    """Within the block, rows that mixers see are pieces of longer ones; the backward pass belongs into the block where activations are recomputed."""
    global _active
    before, _active = _active, pieces
    try:
        yield
    finally:
        _active = before


def number_segments(segments_BT: Tensor) -> Segments:
    """`read_segments`, where rows are pieces with regard to what the pieces before them end with."""
    found = read_segments(segments_BT)
    if _active is None:
        return found
    # The id of the last real token (0 where a piece has none), and then of all pieces before.
    last_B = torch.where(found.real_BT, segments_BT, 0).gather(1, _last_real(found.real_BT))[:, 0]
    before_B = torch.zeros_like(last_B)
    for each_B in _active.gather(last_B)[: _active.rank]:
        before_B = torch.where(each_B != 0, each_B, before_B)
    first_B = segments_BT.gather(1, found.real_BT.long().argmax(1, keepdim=True))[:, 0]
    new_B = found.real_BT.any(1) & (before_B != 0) & (first_B != before_B)
    begun_BT = found.real_BT.long().cumsum(1) > 0
    return Segments(found.real_BT, found.index_BT + (new_B[:, None] & begun_BT).long())


def inputs_before(x_BTC: Tensor, J: int, state_BJC: Tensor | None, segments: Segments | None) -> Tensor | None:
    """The J inputs before x, of the same sequence: ``state_BJC``, or where rows are pieces what the pieces before hold."""
    if _active is None:
        return state_BJC
    _no_state(state_BJC)
    B, T, _ = x_BTC.shape
    if not J:
        return None
    tail_BJC = last_inputs(x_BTC, J, None, segments)
    if segments is None:
        own_B, goes_on_B = x_BTC.new_full((B,), T, dtype=torch.long), x_BTC.new_ones(B, dtype=torch.bool)
    else:
        last_B = segments.last_index_B
        own_B, goes_on_B = (segments.real_BT & (segments.index_BT == last_B[:, None])).sum(1), last_B == 0
    place_J = torch.arange(J, device=x_BTC.device)
    shift_BJJ = (place_J[None, :, None] + own_B[:, None, None] == place_J[None, None, :]) & goes_on_B[:, None, None]
    return _fold(shift_BJJ.to(x_BTC.dtype), tail_BJC, _active)


def delta_over_pieces(rule: Rule) -> Rule:
    """``rule``, the delta rule, or where rows are pieces its form over all of them: the same call, the state that of the tokens before."""
    return rule if _active is None else _Delta(rule, _active)


def mean_over_pieces(rule: Rule) -> Rule:
    """The same of the mean rule."""
    return rule if _active is None else _Mean(rule, _active)


@dataclass(frozen=True)
class _Delta:
    rule: Rule
    pieces: Pieces

    def __call__(
        self, read_BTHM: Tensor, write_BTHM: Tensor, value_BTHE: Tensor, gate_BTH: Tensor, log_decay_BTH: Tensor, bank_HME: Tensor,
        state: tuple[Tensor, ...] | None = None, **options: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """One pass whose values have M columns more, through which the piece's map acts on the identity."""
        _no_state(state)
        B, _, H, M = read_BTHM.shape
        E = value_BTHE.shape[-1]
        wide = widest(read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME)
        with torch.autocast(read_BTHM.device.type, enabled=False):
            values = torch.cat([value_BTHE, value_BTHE.new_zeros(*value_BTHE.shape[:-1], M)], -1)
            bank = torch.cat([bank_HME, bank_HME.new_zeros(H, M, M)], -1)
            identity = torch.eye(M, dtype=wide, device=bank.device).expand(B, H, M, M)
            first = torch.cat([identity.new_zeros(B, H, M, E), identity], -1)
            found, (last,) = self.rule(read_BTHM, write_BTHM, values, gate_BTH, log_decay_BTH, bank, (first,), **options)
            g_BTHE, reads_BTHM = found.split([E, M], -1)
            U_BHME, A_BHMM = last.split([E, M], -1)
            D_BHME = _fold(A_BHMM, U_BHME, self.pieces)
            carried_BTHE = torch.einsum("bthm,bhme->bthe", reads_BTHM, D_BHME.to(reads_BTHM.dtype))
            return g_BTHE + carried_BTHE, (torch.baddbmm(U_BHME.flatten(0, 1), A_BHMM.flatten(0, 1), D_BHME.flatten(0, 1)).view_as(U_BHME),)


@dataclass(frozen=True)
class _Mean:
    rule: Rule
    pieces: Pieces

    def __call__(
        self, read_BTHM: Tensor, write_BTHM: Tensor, value_BTHE: Tensor, gate_BTH: Tensor, log_decay_BTH: Tensor, bank_HME: Tensor, prior_HM: Tensor,
        state: tuple[Tensor, ...] | None = None, *, index_BT: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The piece's own sums first, for reads are divided by weights that need the state; then the rule from that state."""
        _no_state(state)
        wide = widest(read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME, prior_HM)
        with torch.autocast(read_BTHM.device.type, enabled=False):
            decay_BTH, write, value = log_decay_BTH.to(wide).clamp(min=LEAST_LOG_DECAY), (write_BTHM * gate_BTH[..., None]).to(wide), value_BTHE.to(wide)
            # From a token to the end, its own decay left out: sums from behind, so that what is near the end, and lasts, is exact however long the piece is.
            after_BTH = F.pad(decay_BTH[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
            lasts_BTH, keep_BH = after_BTH.exp(), decay_BTH.sum(1).exp()
            if index_BT is not None:
                last_B = index_BT[:, -1]
                lasts_BTH = lasts_BTH * (index_BT == last_B[:, None])[..., None]
                keep_BH = keep_BH * (last_B == 0)[:, None]
            ones = torch.cat([value, torch.ones_like(value[..., :1])], -1)
            U_BHMX = torch.einsum("bthm,bthx->bhmx", write * lasts_BTH[..., None], ones)
            S_BHMX = _fold(keep_BH[..., None, None], U_BHMX.flatten(2)[:, :, None], self.pieces).view_as(U_BHMX)
        own = (read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME, prior_HM)
        return self.rule(*own, (S_BHMX[..., :-1], S_BHMX[..., -1]), index_BT=index_BT, **options)


def _fold(A: Tensor, U: Tensor, pieces: Pieces) -> Tensor:
    return cast(Tensor, _Fold.apply(A, U, pieces))


class _Fold(torch.autograd.Function):
    """(A, U) of every piece to the state before this one: A (…, X, X), U (…, X, C) to S_in (…, X, C)."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, U: Tensor, pieces: Pieces) -> Tensor:
        rank, X = pieces.rank, A.shape[-1]
        maps = [each.split([X, U.shape[-1]], -1) for each in pieces.gather(torch.cat([A, U], -1))]
        S = torch.zeros_like(U)
        for each_A, each_U in maps[:rank]:
            S = each_A @ S + each_U
        ctx.pieces = pieces
        ctx.save_for_backward(S, *(each_A.clone() for each_A, _ in maps[rank + 1 :]))
        return S

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        refuse_second_derivative("a state handed from piece to piece", "train without context parallelism")
        S, *later_A = ctx.saved_tensors
        pieces: Pieces = ctx.pieces
        later = pieces.gather(gradients[0])[pieces.rank + 1 :]
        E = torch.zeros_like(S)
        for each_A, each_d in zip(reversed(later_A), reversed(later), strict=True):
            E = each_d + each_A.mT @ E
        return E @ S.mT if ctx.needs_input_grad[0] else None, E, None


def _last_real(real_BT: Tensor) -> Tensor:
    """The place of each row's last real token (B, 1); 0 where there is none."""
    places_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    return torch.where(real_BT, places_T, 0).amax(1, keepdim=True)


def _no_state(state: object) -> None:
    if state is not None:
        raise InputError("state is given for rows that are pieces of sequences: leave it out, the piece before hands its own over")
