"""Where a read of a written memory comes from: how much of it each token wrote, how much was carried in, how much the learned bank holds.

What a token reads is linear in the values that were written before it. With the notation of gam_lm.ops.mean_rule, for a call that starts with the state D or S,

    delta   g_t = Σ_i P_ti v_i + (e^{G_t} r_t − Σ_i P_ti e^{G_i} a_i) D + (r_t − Σ_i P_ti a_i) V0,   P = (r aᵀ ∘ mask) (I + A)⁻¹ b
    mean    g_t = Σ_i P_ti v_i + Σ_m s_tm e^{G_t} S_m + Σ_m s_tm c_m V0_m,                           P = (s aᵀ ∘ mask) b,  s_tm = r_tm / (c_m + Z_tm)

P is to a written memory what the attention matrix is to attention. It has T × T entries, so that this is for looking at a model, not for running it.

Shapes: B rows, T tokens, I tokens as sources, H heads, M slots per head, E values per slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gam_lm.ops.chunks import LEAST_LOG_DECAY
from gam_lm.ops.delta_rule import unit_triangular_inverse, widest


class MemoryInputs(NamedTuple):
    """What a written memory is given for each token."""

    read_BTHM: Tensor
    """r: where it reads."""
    write_BTHM: Tensor
    """a: where it writes."""
    value_BTHE: Tensor
    """v: what it writes."""
    gate_BTH: Tensor
    """b: how strongly it writes."""
    log_decay_BTH: Tensor
    """log λ: what the memory keeps."""


class Sources(NamedTuple):
    """The parts of what each token reads, which add up to it."""

    weight_BHTI: Tensor
    """P: how much of the value of token i reaches token t; may be negative under the delta rule."""
    carried_BTHE: Tensor
    """What was written before the call."""
    bank_BTHE: Tensor
    """What the learned bank holds, as far as it has not been written over."""


def delta_sources(inputs: MemoryInputs, bank_HME: Tensor, D_BHME: Tensor | None) -> Sources:
    """The parts of a read under the delta rule, in fp32 or wider; ``D_BHME`` is the state before the call."""
    wide = widest(*inputs, bank_HME)
    inputs, bank_HME = MemoryInputs(*(each.to(wide) for each in inputs)), bank_HME.to(wide)
    r_BHTM, a_BHTM, b_BHT1, sum_BHT = _by_head(inputs)
    mask_BHTT = _mask(sum_BHT)
    inverse_BHTT = unit_triangular_inverse((a_BHTM @ a_BHTM.mT * mask_BHTT * b_BHT1).tril(-1))
    weight_BHTI = (r_BHTM @ a_BHTM.mT * mask_BHTT) @ inverse_BHTT * b_BHT1.mT
    bank_BHTE = (r_BHTM - weight_BHTI @ a_BHTM) @ bank_HME
    from_start_BHT1 = sum_BHT.exp()[..., None]
    carried_BHTE = torch.zeros_like(bank_BHTE)
    if D_BHME is not None:
        carried_BHTE = (r_BHTM * from_start_BHT1 - weight_BHTI @ (a_BHTM * from_start_BHT1)) @ D_BHME.to(bank_BHTE.dtype)
    return Sources(weight_BHTI, carried_BHTE.transpose(1, 2), bank_BHTE.transpose(1, 2))


def mean_sources(inputs: MemoryInputs, bank_HME: Tensor, prior_HM: Tensor, state: tuple[Tensor, Tensor] | None) -> Sources:
    """The parts of a read from decayed means, in fp32 or wider; ``state`` is (S, Z) before the call."""
    wide = widest(*inputs, bank_HME, prior_HM)
    inputs, bank_HME, prior_HM = MemoryInputs(*(each.to(wide) for each in inputs)), bank_HME.to(wide), prior_HM.to(wide)
    r_BHTM, a_BHTM, b_BHT1, sum_BHT = _by_head(inputs)
    mask_BHTT = _mask(sum_BHT)
    from_start_BHT1 = sum_BHT.exp()[..., None]
    written_BHTM = a_BHTM * b_BHT1
    Z_BHTM = mask_BHTT @ written_BHTM
    if state is not None:
        Z_BHTM = Z_BHTM + from_start_BHT1 * state[1][:, :, None].to(Z_BHTM.dtype)
    share_BHTM = r_BHTM / (prior_HM[:, None] + Z_BHTM)
    weight_BHTI = share_BHTM @ written_BHTM.mT * mask_BHTT
    bank_BHTE = (share_BHTM * prior_HM[:, None]) @ bank_HME
    carried_BHTE = torch.zeros_like(bank_BHTE) if state is None else (share_BHTM * from_start_BHT1) @ state[0].to(bank_BHTE.dtype)
    return Sources(weight_BHTI, carried_BHTE.transpose(1, 2), bank_BHTE.transpose(1, 2))


def _by_head(inputs: MemoryInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, a (B, H, T, M), b (B, H, T, 1) and the running sum of log λ (B, H, T)."""
    r_BHTM, a_BHTM = inputs.read_BTHM.transpose(1, 2), inputs.write_BTHM.transpose(1, 2)
    return r_BHTM, a_BHTM, inputs.gate_BTH.mT[..., None], inputs.log_decay_BTH.mT.clamp(min=LEAST_LOG_DECAY).cumsum(-1)


def _mask(sum_BHT: Tensor) -> Tensor:
    """exp(G_t − G_i) for i ≤ t, else 0."""
    apart_BHTT = sum_BHT[..., :, None] - sum_BHT[..., None, :]
    later_TT = torch.ones(apart_BHTT.shape[-2:], dtype=torch.bool, device=apart_BHTT.device).tril()
    return apart_BHTT.masked_fill(~later_TT, -torch.inf).exp()
