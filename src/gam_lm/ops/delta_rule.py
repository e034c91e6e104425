"""The delta rule: a memory whose slots are corrected towards what the sequence wrote last.

    D_t = λ_t D_{t−1} + b_t a_t (v_t − (V0 + λ_t D_{t−1})ᵀ a_t)ᵀ              g_t = (V0 + D_t)ᵀ r_t

A token corrects what the ones before it wrote, so that what the tokens of a chunk really write, W, solves a unit-triangular system. With the state D at the
chunk's start, A = tril(b (a aᵀ) ∘ mask, −1) and mask and G as in gam_lm.ops.chunks,

    W = (I + A)⁻¹ b (v − a V0 − e^G a D)              g = r V0 + e^G r D + (r aᵀ ∘ mask) W

the chunked form of Yang et al. (arXiv 2406.06484) with the decay of Gated DeltaNet (arXiv 2412.06464), on the deviation from V0.

Products are taken in the dtype of the values where the device multiplies it natively, so that autocast's fast ones are used; masks, the system and the state
are fp32, or fp64 where an input is.
The gradient is written out: it is the chunks' own algebra backwards, while autograd would pass over every L × L matrix several times more.

Shapes: B rows, T tokens, H heads, M slots per head, E values per slot, J chunks of L tokens, N = H·B, X = 2L rows: a chunk's reads, then its writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gam_lm.ops.chunks import LEAST_LOG_DECAY, Chunks, chunk_tokens
from gam_lm.ops.first_derivative import refuse_second_derivative
from gam_lm.ops.number_formats import product_format


def delta_memory(
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHE: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HME: Tensor,
    state: tuple[Tensor, ...] | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor]]:
    """A memory that is written by the delta rule.

    Args:
        read_BTHM: r, where each token reads.
        write_BTHM: a, where it writes, of length ≤ 1, or the memory may grow without bound.
        value_BTHE: v, what it writes.
        gate_BTH: b in [0, 1], how strongly; 0 writes nothing.
        log_decay_BTH: log λ ≤ 0; 0 forgets nothing, −∞ everything.
        bank_HME: V0, what the memory holds before a word was read.
        state: (D,) of shape (B, H, M, E) after the tokens before; None starts the sequences.
        chunk_size: L, of no influence on the result but rounding; on a CPU at most `CPU_CHUNK`.
        index_BT: number of sequence starts in the row so far (see gam_lm.ops.segments); the memory is V0 again where it changes.

    Returns:
        g (B, T, H, E), what each token reads, in the dtype of the values, and the state in fp32, or fp64 where an input is.
    """
    B, T, H, _ = read_BTHM.shape
    low = product_format(value_BTHE.dtype, value_BTHE.device)
    wide = widest(read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME)
    with torch.autocast(read_BTHM.device.type, enabled=False):
        gate_BTH, log_decay_BTH, bank_HME = gate_BTH.to(wide), log_decay_BTH.to(wide), bank_HME.to(wide)
        D_BHME = state[0].to(wide) if state else bank_HME.new_zeros(B, *bank_HME.shape)
        if T == 0 or B == 0:
            return value_BTHE, (D_BHME,)
        if T == 1:
            g_B1HE, last = _step(read_BTHM.to(wide), write_BTHM.to(wide), value_BTHE.to(wide), gate_BTH, log_decay_BTH, bank_HME, D_BHME, index_BT)
            return g_B1HE.to(value_BTHE.dtype), last
        chunks = Chunks(B, T, H, chunk_tokens(chunk_size, value_BTHE.device), index_BT)
        address_JNXM = torch.cat([chunks.split(read_BTHM.to(low)), chunks.split(write_BTHM.to(low))], 2)
        sum_JNL = chunks.split(log_decay_BTH.clamp(min=LEAST_LOG_DECAY)[..., None])[..., 0].cumsum(-1)
        gate_JNL1 = chunks.split(gate_BTH[..., None])
        g_JNLE, D_NME = _DeltaRule.apply(address_JNXM, chunks.split(value_BTHE.to(low)), gate_JNL1, sum_JNL, bank_HME, chunks.state(D_BHME), chunks)
        return chunks.join(g_JNLE).to(value_BTHE.dtype), (chunks.unstate(D_NME),)


class _DeltaRule(torch.autograd.Function):
    """All chunks of a sequence, and their gradient."""

    @staticmethod
    def forward(
        ctx: Any, address_JNXM: Tensor, v_JNLE: Tensor, b_JNL1: Tensor, sum_JNL: Tensor, bank_HME: Tensor, D_NME: Tensor, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        low, wide, L = v_JNLE.dtype, sum_JNL.dtype, v_JNLE.shape[2]
        decays = chunks.decays(sum_JNL)
        mask_JNLL, from_start_JNL1, to_end_JNL1 = (each.to(low) for each in decays[:3])
        a_JNLM = address_JNXM[:, :, L:]
        scores_JNXL = address_JNXM @ a_JNLM.mT
        seen_JNLL, met_JNLL = scores_JNXL[:, :, :L] * mask_JNLL, scores_JNXL[:, :, L:] * mask_JNLL
        inverse_JNLL = unit_triangular_inverse(met_JNLL.to(wide) * b_JNL1)
        solved_JNLL = (inverse_JNLL * b_JNL1.mT).to(low)
        held_JNXE = chunks.by_head(address_JNXM, bank_HME.to(low))
        unwritten_JNLE = v_JNLE - held_JNXE[:, :, L:]
        into_JNLM = a_JNLM * to_end_JNL1

        starts, found, errors, written = [], [], [], []
        for j in range(len(v_JNLE)):
            start_NME = D_NME.to(low)
            found_NXE = address_JNXM[j] @ start_NME
            error_NLE = torch.addcmul(unwritten_JNLE[j], from_start_JNL1[j], found_NXE[:, L:], value=-1)
            W_NLE = solved_JNLL[j] @ error_NLE
            starts.append(start_NME)
            found.append(found_NXE)
            errors.append(error_NLE)
            written.append(W_NLE)
            D_NME = decays.keep_JN11[j] * D_NME + into_JNLM[j].mT @ W_NLE
        D_JNME, found_JNXE, error_JNLE, W_JNLE = (torch.stack(each) for each in (starts, found, errors, written))
        g_JNLE = torch.addcmul(held_JNXE[:, :, :L], from_start_JNL1, found_JNXE[:, :, :L]) + seen_JNLL @ W_JNLE

        ctx.chunks = chunks
        ctx.save_for_backward(address_JNXM, b_JNL1, sum_JNL, bank_HME, scores_JNXL, inverse_JNLL, D_JNME, found_JNXE, error_JNLE, W_JNLE)
        return g_JNLE, D_NME

    @staticmethod
    def backward(ctx: Any, dg_JNLE: Tensor, dD_NME: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("the delta rule", "differentiate gam_lm.ops.delta_rule.naive_delta_memory")
        address_JNXM, b_JNL1, sum_JNL, bank_HME, scores_JNXL, inverse_JNLL, D_JNME, found_JNXE, error_JNLE, W_JNLE = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        low, wide, L = W_JNLE.dtype, sum_JNL.dtype, W_JNLE.shape[2]
        decays = chunks.decays(sum_JNL)
        mask_JNLL, from_start_JNL1, to_end_JNL1, _ = (each.to(low) for each in decays)
        r_JNLM, a_JNLM = address_JNXM[:, :, :L], address_JNXM[:, :, L:]
        solved_JNLL = (inverse_JNLL * b_JNL1.mT).to(low)
        seen_JNLL = scores_JNXL[:, :, :L] * mask_JNLL
        into_JNLM = a_JNLM * to_end_JNL1

        dW_JNLE = seen_JNLL.mT @ dg_JNLE
        dread_JNME = r_JNLM.mT @ (dg_JNLE * from_start_JNL1)
        ends, writes, errors = [], [], []
        for j in reversed(range(len(W_JNLE))):
            end_NME = dD_NME.to(low)
            dW_NLE = dW_JNLE[j] + into_JNLM[j] @ end_NME
            derror_NLE = solved_JNLL[j].mT @ dW_NLE
            ends.append(end_NME)
            writes.append(dW_NLE)
            errors.append(derror_NLE)
            dD_NME = decays.keep_JN11[j] * dD_NME + (dread_JNME[j] - a_JNLM[j].mT @ (derror_NLE * from_start_JNL1[j]))
        dend_JNME, dW_JNLE, derror_JNLE = (torch.stack(each[::-1]) for each in (ends, writes, errors))

        # What was read of V0 and of D at the chunk's start.
        dheld_JNXE = torch.cat([dg_JNLE, -derror_JNLE], 2)
        dfound_JNXE = dheld_JNXE * from_start_JNL1.repeat(1, 1, 2, 1)
        daddress_JNXM = chunks.by_head(dheld_JNXE, bank_HME.to(low).mT) + dfound_JNXE @ D_JNME.mT

        dbank_HME = (chunks.of_head(address_JNXM).mT @ chunks.of_head(dheld_JNXE)).to(wide)
        dfrom_start_JNL = _inner(dheld_JNXE, found_JNXE, wide).unflatten(-1, (2, L)).sum(-2)

        # What was written into the state.
        dinto_JNLM = W_JNLE @ dend_JNME.mT
        dto_end_JNL = _inner(dinto_JNLM, a_JNLM, wide)
        dkeep_JN = _inner(D_JNME, dend_JNME, wide).sum(-1)

        # The system: d(X⁻¹) = −X⁻ᵀ dX X⁻ᵀ, below the diagonal.
        dsolved_JNLL = (dW_JNLE @ error_JNLE.mT).to(wide)
        low_inverse_JNLL = inverse_JNLL.to(low)
        dA_JNLL = -(low_inverse_JNLL.mT @ (dsolved_JNLL * b_JNL1.mT).to(low) @ low_inverse_JNLL.mT).tril(-1) * mask_JNLL
        dmet_JNLL = (dA_JNLL * scores_JNXL[:, :, L:]).to(wide)
        db_JNL = (dsolved_JNLL * inverse_JNLL).sum(-2) + dmet_JNLL.sum(-1)

        # The scores, their mask, and its decay.
        dseen_JNLL = (dg_JNLE @ W_JNLE.mT) * mask_JNLL
        dscores_JNXL = torch.cat([dseen_JNLL, dA_JNLL * b_JNL1.to(low)], 2)
        daddress_JNXM = daddress_JNXM + dscores_JNXL @ a_JNLM
        daddress_JNXM[:, :, L:] += dscores_JNXL.mT @ address_JNXM + dinto_JNLM * to_end_JNL1
        dmask_JNLL = torch.addcmul((dseen_JNLL * scores_JNXL[:, :, :L]).to(wide), dmet_JNLL, b_JNL1)
        ended_JNL = dto_end_JNL * decays.to_end_JNL1[..., 0]
        dsum_JNL = dmask_JNLL.sum(-1) - dmask_JNLL.sum(-2) + dfrom_start_JNL * decays.from_start_JNL1[..., 0] - ended_JNL
        dsum_JNL[..., -1] += ended_JNL.sum(-1) + dkeep_JN * decays.keep_JN11[..., 0, 0]
        return daddress_JNXM, derror_JNLE, db_JNL[..., None], dsum_JNL, dbank_HME, dD_NME, None


def _inner(x: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """Σ x ∘ y over the last dimension."""
    return (x * y).sum(-1, dtype=wide)


def unit_triangular_inverse(A_XLL: Tensor) -> Tensor:
    """(I + A)⁻¹ of strictly lower triangular matrices, by substitution; what stands on or above the diagonal is not looked at."""
    eye_LL = torch.eye(A_XLL.shape[-1], dtype=A_XLL.dtype, device=A_XLL.device)
    return torch.linalg.solve_triangular(A_XLL, eye_LL.expand_as(A_XLL), upper=False, unitriangular=True)


def widest(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where one of the tensors is."""
    dtype = torch.float32
    for each in tensors:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype


def kept(log_decay_B1H: Tensor, index_B1: Tensor | None) -> Tensor:
    """λ of a single token (B, H, 1, 1), 0 where it starts a sequence."""
    keep_BH = log_decay_B1H[:, 0].exp()
    if index_B1 is not None:
        keep_BH = keep_BH * (index_B1 == 0)
    return keep_BH[..., None, None]


def _step(
    r: Tensor, a: Tensor, v: Tensor, b: Tensor, log_decay: Tensor, bank_HME: Tensor, D_BHME: Tensor, index_B1: Tensor | None
) -> tuple[Tensor, tuple[Tensor]]:
    """The recurrence as it stands, for one token."""
    D_BHME = kept(log_decay, index_B1) * D_BHME
    r_BH1M, a_BH1M, v_BH1E = r.transpose(1, 2), a.transpose(1, 2), v.transpose(1, 2)
    W_BH1E = b.transpose(1, 2)[..., None] * (v_BH1E - a_BH1M @ (bank_HME + D_BHME))
    D_BHME = D_BHME + a_BH1M.mT * W_BH1E
    return (r_BH1M @ (bank_HME + D_BHME)).transpose(1, 2), (D_BHME,)


def naive_delta_memory(
    read_BTHM: Tensor, write_BTHM: Tensor, value_BTHE: Tensor, gate_BTH: Tensor, log_decay_BTH: Tensor, bank_HME: Tensor, D_BHME: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it stands, one row, head and token at a time, for tests."""
    B, T, H, _ = read_BTHM.shape
    outputs, states = [], []
    for n in range(B):
        for h in range(H):
            D_ME = torch.zeros_like(bank_HME[h]) if D_BHME is None else D_BHME[n, h]
            seen = []
            for t in range(T):
                D_ME = log_decay_BTH[n, t, h].exp() * D_ME
                error_E = value_BTHE[n, t, h] - (bank_HME[h] + D_ME).T @ write_BTHM[n, t, h]
                D_ME = D_ME + gate_BTH[n, t, h] * torch.outer(write_BTHM[n, t, h], error_E)
                seen.append((bank_HME[h] + D_ME).T @ read_BTHM[n, t, h])
            outputs.append(torch.stack(seen))
            states.append(D_ME)
    return torch.stack(outputs).unflatten(0, (B, H)).transpose(1, 2), torch.stack(states).unflatten(0, (B, H))
