"""How much of each slot of a written memory has been changed by the text, token by token: for looking at a model, a step at a time.

Under the delta rule (gam_lm.ops.delta_rule) a slot's change is its row of D; under the mean rule (gam_lm.ops.mean_rule) it is what its mean differs from the
bank by, (S_m − Z_m V0_m) / (c_m + Z_m).

Shapes: B rows, T tokens, H heads, M slots per head, E values per slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_lm.ops.read_sources import MemoryInputs


def delta_held(inputs: MemoryInputs, bank_HME: Tensor, D_BHME: Tensor | None) -> Tensor:
    """Length of each row of D after each token (B, T, H, M); ``D_BHME`` is the state before the call."""
    a_BTHM, v_BTHE, b_BTH, decay_BTH = inputs.write_BTHM, inputs.value_BTHE, inputs.gate_BTH, inputs.log_decay_BTH.exp()
    dtype = torch.promote_types(v_BTHE.dtype, torch.float32)
    D = bank_HME.new_zeros(len(a_BTHM), *bank_HME.shape, dtype=dtype) if D_BHME is None else D_BHME.to(dtype)
    found = []
    for t in range(a_BTHM.shape[1]):
        a_BHM = a_BTHM[:, t].to(dtype)
        D = D * decay_BTH[:, t, :, None, None]
        missing_BHE = v_BTHE[:, t] - torch.einsum("bhm,bhme->bhe", a_BHM, bank_HME + D)
        D = D + torch.einsum("bh,bhm,bhe->bhme", b_BTH[:, t].to(dtype), a_BHM, missing_BHE)
        found.append(D.norm(dim=-1))
    return torch.stack(found, 1)


def mean_held(inputs: MemoryInputs, bank_HME: Tensor, prior_HM: Tensor, state: tuple[Tensor, Tensor] | None) -> Tensor:
    """Length of each slot's change after each token (B, T, H, M); ``state`` is (S, Z) before the call."""
    a_BTHM, v_BTHE, b_BTH, decay_BTH = inputs.write_BTHM, inputs.value_BTHE, inputs.gate_BTH, inputs.log_decay_BTH.exp()
    dtype = torch.promote_types(v_BTHE.dtype, torch.float32)
    S = bank_HME.new_zeros(len(a_BTHM), *bank_HME.shape, dtype=dtype) if state is None else state[0].to(dtype)
    Z = torch.zeros_like(S[..., 0]) if state is None else state[1].to(dtype)
    found = []
    for t in range(a_BTHM.shape[1]):
        written_BHM = a_BTHM[:, t].to(dtype) * b_BTH[:, t, :, None]
        S = S * decay_BTH[:, t, :, None, None] + torch.einsum("bhm,bhe->bhme", written_BHM, v_BTHE[:, t].to(dtype))
        Z = Z * decay_BTH[:, t, :, None] + written_BHM
        found.append(((S - Z[..., None] * bank_HME) / (prior_HM + Z)[..., None]).norm(dim=-1))
    return torch.stack(found, 1)
