"""The delta rule by kernels for a GPU, each by the name that asks for it. A kernel that is named runs or refuses: nothing else runs in its place.

Shapes: B rows, T tokens, N sequences in them, H heads, M slots per head, E values per slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gam_lm.errors import InputError, MissingExtraError
from gam_lm.ops.chunks import LEAST_LOG_DECAY
from gam_lm.ops.delta_rule import delta_memory
from gam_lm.ops.segments import pack
from gam_lm.ops.triton_there import triton_serves

MOST_SLOTS = 256
"""The largest M of our kernel: a program holds the state of so many slots in registers."""


def fla_delta_memory(
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
    """`delta_memory` by flash-linear-attention's kernel of the gated delta rule, on a GPU: products in bf16, sums in fp32, chunks of its own.

    On the deviation from V0 the rule is theirs, with key a and query r. Rows of several sequences go as one row with ``cu_seqlens``.

    Raises:
        MissingExtraError: where the package is not installed.
        InputError: on a device it has no kernel for.
    """
    device = read_BTHM.device.type
    if device != "cuda":
        raise InputError(f"backend is 'fla' on {device}: flash-linear-attention runs on a GPU, use backend='torch'")
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise MissingExtraError("flash-linear-attention", "fla", "backend 'fla'") from error
    return by_gated_delta_rule(
        chunk_gated_delta_rule, read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME, state, low=torch.bfloat16, wide=torch.float32, index_BT=index_BT
    )


def by_gated_delta_rule(
    rule: Callable[..., tuple[Tensor, Tensor]],
    read_BTHM: Tensor,
    write_BTHM: Tensor,
    value_BTHE: Tensor,
    gate_BTH: Tensor,
    log_decay_BTH: Tensor,
    bank_HME: Tensor,
    state: tuple[Tensor, ...] | None,
    *,
    low: torch.dtype,
    wide: torch.dtype,
    index_BT: Tensor | None,
) -> tuple[Tensor, tuple[Tensor]]:
    """`delta_memory` by any function of the signature of ``fla.ops.gated_delta_rule.chunk_gated_delta_rule``, which reads its queries, keys and values in ``low``,
    the rest in ``wide``."""
    B, T, H, M = read_BTHM.shape
    E = value_BTHE.shape[-1]
    first_BHME = state[0].to(wide) if state else None
    if B * T == 0:
        return value_BTHE, (value_BTHE.new_zeros(B, H, M, E, dtype=wide) if first_BHME is None else first_BHME,)
    with torch.autocast(read_BTHM.device.type, enabled=False):
        read, write, value, gate, log_decay, bank = (each.to(wide) for each in (read_BTHM, write_BTHM, value_BTHE, gate_BTH, log_decay_BTH, bank_HME))
        unwritten = value - torch.einsum("bthm,hme->bthe", write, bank)
        inputs = [read.to(low), write.to(low), unwritten.to(low), log_decay.clamp(min=LEAST_LOG_DECAY), gate]
        if index_BT is None:
            g, last = rule(*inputs, scale=1.0, initial_state=first_BHME, output_final_state=True)
        else:
            rows = pack(index_BT)
            first = None if first_BHME is None else first_BHME.index_select(0, rows.row_N) * rows.continues_N[:, None, None, None]
            inputs = [each.flatten(0, 1).unsqueeze(0) for each in inputs]
            g, last = rule(*inputs, scale=1.0, initial_state=first, output_final_state=True, cu_seqlens=rows.cu_seqlens)
            last = last.index_select(0, rows.last_B)
        g_BTHE = torch.einsum("bthm,hme->bthe", read, bank) + g.to(wide).view(B, T, H, E)
        return g_BTHE.to(value_BTHE.dtype), (last.to(wide),)


def triton_delta_memory(
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
    """`delta_memory` by the library's own kernel (gam_lm.ops.delta_rule_triton), in chunks of its own and with the state in fp32.

    Raises:
        MissingExtraError: where triton is not installed.
        InputError: for what it has no kernel for: a device that is no GPU (unless TRITON_INTERPRET is set), fp64, heads of too many slots.
    """
    try:
        from gam_lm.ops.delta_rule_triton import FORMATS, INTERPRETED, delta_rule
    except ImportError as error:
        raise MissingExtraError("triton", "triton", "backend 'triton'") from error
    low, device, (B, T, _, M) = value_BTHE.dtype, read_BTHM.device.type, read_BTHM.shape
    if device != "cuda" and not INTERPRETED:
        raise InputError(f"backend is 'triton' on {device}: its kernels run on a GPU, use backend='torch'")
    if low not in FORMATS:
        raise InputError(f"backend is 'triton' with values of {str(low).removeprefix('torch.')}: it has fp32, bf16 and fp16, use backend='torch'")
    if M > MOST_SLOTS:
        raise InputError(f"backend is 'triton' with {M} slots in a head: it has at most {MOST_SLOTS}, use more heads or backend='torch'")
    with torch.autocast(device, enabled=False):
        read, write, bank = read_BTHM.to(low), write_BTHM.to(low), bank_HME.to(low)
        first_BHME = state[0].float() if state else None
        if B * T == 0:
            return value_BTHE, (bank_HME.new_zeros(B, *bank_HME.shape, dtype=torch.float32) if first_BHME is None else first_BHME,)
        unwritten = value_BTHE - torch.einsum("bthm,hme->bthe", write, bank)
        log_decay = log_decay_BTH.float().clamp(min=LEAST_LOG_DECAY)
        g_BTHE, D_BHME = delta_rule(read, write, unwritten, gate_BTH.float(), log_decay, first_BHME, index_BT)
        return torch.einsum("bthm,hme->bthe", read, bank) + g_BTHE, (D_BHME,)


DELTA_KERNELS: Mapping[str, Callable[..., tuple[Tensor, tuple[Tensor]]]] = {"fla": fla_delta_memory, "triton": triton_delta_memory}
"""By the name of a backend that is not torch."""


def automatic_backend(device_type: str, slots: int, dtype: torch.dtype) -> str:
    """What "auto" takes: our kernel on a GPU where triton is installed and it has format and size, else plain PyTorch."""
    return "triton" if triton_serves(device_type, dtype) and slots <= MOST_SLOTS else "torch"


def delta_rule_by(backend: str, read_BTHM: Tensor, value_BTHE: Tensor) -> Callable[..., tuple[Tensor, tuple[Tensor]]]:
    """The rule of a backend's name for such reads and values; a single token is one step in plain PyTorch, unless a kernel is named."""
    if backend == "auto":
        backend = "torch" if read_BTHM.shape[1] <= 1 else automatic_backend(read_BTHM.device.type, read_BTHM.shape[-1], value_BTHE.dtype)
    return delta_memory if backend == "torch" else DELTA_KERNELS[backend]
