"""The recurrences as ONNX operators, so that one graph takes any number of tokens, one included.

    com.microsoft::LinearAttention      S_t = e^{d_t} S_{t−1} + k_t v_tᵀ                                          update_rule "gated"
                                        S_t = e^{d_t} S_{t−1} + b_t k_t (v_t − e^{d_t} S_{t−1}ᵀ k_t)ᵀ             update_rule "gated_delta"
                                        o_t = S_tᵀ q_t                                                            scale 1

The delta rule of gam_lm.ops.delta_rule is the second one on the deviation from V0: key a, query r, value v − V0ᵀ a, and V0ᵀ r is added outside.
The mean rule of gam_lm.ops.mean_rule is the first one twice: for the weights Z, which are values of a key of one channel, and for the sums S.

The operator is standard in opset 27 and has the domain com.microsoft in runtimes before that. A window of attention has no such operator, and its blocks
depend on T: here its scores are held whole.

Shapes: B rows, T tokens, H heads, M slots (or channels of a key), E values per slot, L cached tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from gam_lm.mixers.key_value_cache import attend
from gam_lm.ops.delta_rule import delta_memory
from gam_lm.ops.mean_rule import mean_memory

OPERATOR = "com.microsoft::LinearAttention"


def linear_attention(
    q_BTHM: Tensor, k_BTHM: Tensor, v_BTHE: Tensor, state_BHME: Tensor, log_decay_BTH: Tensor, gate_BTH: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operator in the graph: what is read (B, T, H, E), and the state after the last token. Without a gate the rule is "gated"."""
    B, T, H, E = v_BTHE.shape
    inputs = [q_BTHM.flatten(2), k_BTHM.flatten(2), v_BTHE.flatten(2), state_BHME, log_decay_BTH] + ([] if gate_BTH is None else [gate_BTH])
    attributes: dict[str, Any] = {"q_num_heads": H, "kv_num_heads": H, "update_rule": "gated" if gate_BTH is None else "gated_delta", "scale": 1.0}
    o_BTX, state_BHME = torch.onnx.ops.symbolic_multi_out(
        OPERATOR, inputs, attributes, dtypes=(v_BTHE.dtype, state_BHME.dtype), shapes=((B, T, H * E), state_BHME.shape), version=1
    )
    return o_BTX.unflatten(2, (H, E)), state_BHME


def _delta(
    read_BTHM: Tensor, write_BTHM: Tensor, value_BTHE: Tensor, gate_BTH: Tensor, log_decay_BTH: Tensor, bank_HME: Tensor,
    state: tuple[Tensor, ...], **_: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`gam_lm.ops.delta_rule.delta_memory`."""
    unwritten_BTHE = value_BTHE - _of_bank(write_BTHM, bank_HME)
    g_BTHE, D_BHME = linear_attention(read_BTHM, write_BTHM, unwritten_BTHE, state[0], log_decay_BTH, gate_BTH)
    return _of_bank(read_BTHM, bank_HME) + g_BTHE, (D_BHME,)


def _of_bank(address_BTHM: Tensor, bank_HME: Tensor) -> Tensor:
    """V0ᵀ a of every head (B, T, H, E)."""
    return (address_BTHM.transpose(1, 2) @ bank_HME).transpose(1, 2)


def _mean(
    read_BTHM: Tensor, write_BTHM: Tensor, value_BTHE: Tensor, gate_BTH: Tensor, log_decay_BTH: Tensor, bank_HME: Tensor, prior_HM: Tensor,
    state: tuple[Tensor, ...], **_: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`gam_lm.ops.mean_rule.mean_memory`."""
    S_BHME, Z_BHM = state
    weight_BTHM = write_BTHM * gate_BTH[..., None]
    one_BTH1 = torch.ones_like(gate_BTH)[..., None]
    Z_BTHM, Z_BH1M = linear_attention(one_BTH1, one_BTH1, weight_BTHM, Z_BHM[:, :, None], log_decay_BTH, None)
    share_BTHM = read_BTHM / (prior_HM + Z_BTHM)
    g_BTHE, S_BHME = linear_attention(share_BTHM, weight_BTHM, value_BTHE, S_BHME, log_decay_BTH, None)
    return _of_bank(share_BTHM, prior_HM[..., None] * bank_HME) + g_BTHE, (S_BHME, Z_BH1M[:, :, 0])


def _attend(
    q_BTHM: Tensor, k_BTHM: Tensor, v_BTHE: Tensor, cache: tuple[Tensor, ...], *, scale: float | None = None, window: int | None = None, **_: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`gam_lm.mixers.key_value_cache.attend`, with scores of T × (L + T)."""
    T, L = q_BTHM.shape[1], cache[0].shape[1]
    k_BSHM, v_BSHE = torch.cat([cache[0], k_BTHM], 1), torch.cat([cache[1], v_BTHE], 1)
    own_BS = torch.cat([cache[2], torch.ones_like(q_BTHM[:, :, 0, 0], dtype=torch.bool)], 1)
    apart_TS = torch.arange(T)[:, None] + L - torch.arange(L + T)
    mask_TS = apart_TS >= 0 if window is None else (apart_TS >= 0) & (apart_TS < window)
    q, k, v = (each.transpose(1, 2) for each in (q_BTHM, k_BSHM, v_BSHE))
    scores_BHTS = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    y_BHTE = scores_BHTS.masked_fill(~(mask_TS & own_BS[:, None, None]), -torch.inf).softmax(-1) @ v
    return y_BHTE.transpose(1, 2), tuple(each if window is None else each[:, T:] for each in (k_BSHM, v_BSHE, own_BS))


FORMS: Mapping[Callable[..., Any], Callable[..., Any]] = {delta_memory: _delta, mean_memory: _mean, attend: _attend}
"""What stands in a graph for what PyTorch computes."""


@contextmanager
def as_operators() -> Iterator[None]:
    """While a graph is traced, every module that imported a function of FORMS calls what stands for it; not for several threads at once."""
    replaced = [
        (vars(module), name, value) for module in list(sys.modules.values()) if module is not None and module.__name__ != __name__
        for name, value in list(vars(module).items()) if type(value) is FunctionType and value in FORMS
    ]  # fmt: skip
    try:
        for names, name, value in replaced:
            names[name] = FORMS[value]
        yield
    finally:
        for names, name, value in replaced:
            names[name] = value
