"""The mean rule: a memory whose slots hold decayed weighted means of what was written to them.

    mean     Z_t = λ_t Z_{t−1} + b_t a_t       S_t = λ_t S_{t−1} + b_t a_t v_tᵀ       g_t = Σ_m r_tm (c_m V0_m + S_tm) / (c_m + Z_tm)

r and a are where a token reads and writes, v what it writes, b ∈ [0, 1] how strongly, λ = exp(log_decay) ≤ 1 what the memory keeps, V0 what it holds
before a word was read, c how many written values V0 counts for. In chunks (gam_lm.ops.chunks): inside a chunk matrix products under a mask, from chunk to chunk
T/L steps that carry the state.

Shapes: B rows, T tokens, H heads, M slots per head, E values per slot, J chunks of L tokens, N = H·B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_lm.ops.chunks import LEAST_LOG_DECAY, Chunks
from gam_lm.ops.delta_rule import kept, widest
from gam_lm.ops.number_formats import product_format


def mean_memory(
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHE: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HME: Tensor,
    prior_HM: Tensor,
    state: tuple[Tensor, ...] | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A memory whose slots hold decayed weighted means of the values that were written to them.

    Args:
        read_BTHM: r, where each token reads.
        write_BTHM: a ≥ 0, where it writes.
        value_BTHE: v, what it writes.
        gate_BTH: b in [0, 1], how strongly; 0 writes nothing.
        log_decay_BTH: log λ ≤ 0; 0 forgets nothing, −∞ everything.
        bank_HME: V0, what the memory holds before a word was read.
        prior_HM: c > 0.
        state: (S, Z) of shapes (B, H, M, E) and (B, H, M) after the tokens before; None starts the sequences.
        chunk_size: L, of no influence on the result but rounding.
        index_BT: number of sequence starts in the row so far (see gam_lm.ops.segments); the memory is V0 again where it changes.

    Returns:
        g (B, T, H, E), what each token reads, in the dtype of the values, and the state in fp32, or fp64 where an input is.
    """
    B, T, H, _ = read_BTHM.shape
    low = product_format(value_BTHE.dtype, value_BTHE.device)
    wide = widest(read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME, prior_HM)
    with torch.autocast(read_BTHM.device.type, enabled=False):
        read_BTHM, log_decay_BTH, bank_HME, prior_HM = (each.to(wide) for each in (read_BTHM, log_decay_BTH, bank_HME, prior_HM))
        new = bank_HME.new_zeros
        S_BHME, Z_BHM = (each.to(wide) for each in state) if state else (new(B, *bank_HME.shape), new(B, *prior_HM.shape))
        prior_bank_HME = prior_HM[..., None] * bank_HME
        write_BTHM = write_BTHM * gate_BTH[..., None]
        if T == 0 or B == 0:
            return value_BTHE, (S_BHME, Z_BHM)
        if T == 1:
            g_B1HE, last = _step(
                read_BTHM, write_BTHM.to(wide), value_BTHE.to(wide), log_decay_BTH, prior_bank_HME, prior_HM, S_BHME, Z_BHM, index_BT
            )
            return g_B1HE.to(value_BTHE.dtype), last
        chunks = Chunks(B, T, H, chunk_size, index_BT)
        decays = chunks.decays(chunks.split(log_decay_BTH.clamp(min=LEAST_LOG_DECAY)[..., None])[..., 0].cumsum(-1))
        mask_JNLL, from_start_JNL1 = decays.mask_JNLL.to(low), decays.from_start_JNL1.to(low)
        a_JNLM, v_JNLE = chunks.split(write_BTHM.to(low)), chunks.split(value_BTHE.to(low))
        into_JNML = (a_JNLM * decays.to_end_JNL1.to(low)).mT
        S_JNME, S_NME = _carried((into_JNML @ v_JNLE).to(wide), decays.keep_JN11, chunks.state(S_BHME))
        Z_JNM1, Z_NM1 = _carried(into_JNML.sum(-1, keepdim=True, dtype=wide), decays.keep_JN11, chunks.state(Z_BHM)[..., None])

        Z_JNLM = mask_JNLL @ a_JNLM + decays.from_start_JNL1 * Z_JNM1.mT
        share_JNLM = (chunks.split(read_BTHM) / (chunks.heads(prior_HM)[:, None] + Z_JNLM)).to(low)
        seen_JNLL = share_JNLM @ a_JNLM.mT * mask_JNLL
        g_JNLE = chunks.by_head(share_JNLM, prior_bank_HME.to(low)) + (share_JNLM * from_start_JNL1) @ S_JNME.to(low) + seen_JNLL @ v_JNLE
        return chunks.join(g_JNLE).to(value_BTHE.dtype), (chunks.unstate(S_NME), chunks.unstate(Z_NM1[..., 0]))


def _carried(added_JNXX: Tensor, keep_JN11: Tensor, first_NXX: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk (J, N, …) and after the last (N, …): x_{j+1} = keep_j x_j + added_j."""
    states = [first_NXX]
    for added_NXX, keep_N11 in zip(added_JNXX.unbind(0), keep_JN11.unbind(0), strict=True):
        states.append(torch.addcmul(added_NXX, keep_N11, states[-1]))
    return torch.stack(states[:-1]), states[-1]


def _step(
    r: Tensor,
    a: Tensor,
    v: Tensor,
    log_decay: Tensor,
    prior_bank_HME: Tensor,
    prior_HM: Tensor,
    S_BHME: Tensor,
    Z_BHM: Tensor,
    index_B1: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence as it stands, for one token."""
    keep_BH11 = kept(log_decay, index_B1)
    a_BHM = a[:, 0]
    S_BHME = keep_BH11 * S_BHME + a_BHM[..., None] * v.transpose(1, 2)
    Z_BHM = keep_BH11[..., 0] * Z_BHM + a_BHM
    share_BHM = r[:, 0] / (prior_HM + Z_BHM)
    return (share_BHM[..., None, :] @ (prior_bank_HME + S_BHME)).transpose(1, 2), (S_BHME, Z_BHM)


def naive_mean_memory(
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHE: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HME: Tensor,
    prior_HM: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence as it stands, a token at a time, for tests."""
    B, T, H, M = read_BTHM.shape
    S_BHME = value_BTHE.new_zeros(B, H, M, value_BTHE.shape[-1]) if state is None else state[0]
    Z_BHM = value_BTHE.new_zeros(B, H, M) if state is None else state[1]
    seen = []
    for t in range(T):
        keep_BH1 = log_decay_BTH[:, t, :, None].exp()
        weight_BHM = gate_BTH[:, t, :, None] * write_BTHM[:, t]
        Z_BHM = keep_BH1 * Z_BHM + weight_BHM
        S_BHME = keep_BH1[..., None] * S_BHME + weight_BHM[..., None] * value_BTHE[:, t, :, None]
        held_BHME = (prior_HM[..., None] * bank_HME + S_BHME) / (prior_HM + Z_BHM)[..., None]
        seen.append((read_BTHM[:, t, :, :, None] * held_BHME).sum(2))
    return torch.stack(seen, 1), (S_BHME, Z_BHM)
