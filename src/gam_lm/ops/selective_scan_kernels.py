"""The selective scan by the name of a backend. A kernel that is named runs or refuses: nothing else runs in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gam_lm.errors import InputError, MissingExtraError
from gam_lm.ops.selective_scan import selective_scan
from gam_lm.ops.triton_there import triton_serves

Scan = Callable[..., tuple[Tensor, Tensor]]

MOST_STATES = 64
"""The largest N of the kernels, which hold a few times as many numbers per channel in registers."""


def triton_selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_NE: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BNE: Tensor | None = None,
    *,
    chunk_size: int = 64,
    index_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` by the library's own kernels (gam_lm.ops.selective_scan_triton), in chunks of their own.

    A single token is one step without a loop, which plain PyTorch takes.

    Raises:
        MissingExtraError: where triton is not installed.
        InputError: for what it has no kernel for: a device that is no GPU (unless TRITON_INTERPRET is set), fp64, many states per channel.
    """
    try:
        from gam_lm.ops import selective_scan_triton as kernels
    except ImportError as error:
        raise MissingExtraError("triton", "triton", "backend 'triton'") from error
    device, (B, T, _) = x_BTE.device.type, x_BTE.shape
    if device != "cuda" and not kernels.INTERPRETED:
        raise InputError(f"backend is 'triton' on {device}: its kernels run on a GPU, use backend='torch'")
    for each in (x_BTE, dt_BTE, A_NE, B_BTN, C_BTN):
        if each.dtype not in kernels.FORMATS:
            raise InputError(f"backend is 'triton' with {str(each.dtype).removeprefix('torch.')}: it has fp32, bf16 and fp16, use backend='torch'")
    if len(A_NE) > MOST_STATES:
        raise InputError(f"backend is 'triton' with state_size {len(A_NE)}: it has at most {MOST_STATES}, use backend='torch'")
    if T <= 1 or B == 0:
        return selective_scan(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, state_BNE, index_BT=index_BT)
    with torch.autocast(device, enabled=False):
        first_BNE = None if state_BNE is None else state_BNE.float()
        return kernels.selective_scan(x_BTE, dt_BTE, A_NE.float(), B_BTN, C_BTN, first_BNE, index_BT)


def automatic_backend(device_type: str, states: int, dtype: torch.dtype) -> str:
    """What "auto" takes: the kernels on a GPU where triton is installed and they have format and size, else plain PyTorch."""
    return "triton" if triton_serves(device_type, dtype) and states <= MOST_STATES else "torch"


def scan_by(backend: str, device_type: str, states: int, dtype: torch.dtype) -> Scan:
    """The scan of a backend's name."""
    if backend == "auto":
        backend = automatic_backend(device_type, states, dtype)
    return triton_selective_scan if backend == "triton" else selective_scan
