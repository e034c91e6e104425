"""The selective scan by the name of a backend. A kernel that is named runs or refuses: nothing else runs in its place."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from gam_lm.errors import InputError, MissingExtraError
from gam_lm.ops import selective_scan_cpu
from gam_lm.ops.selective_scan import goes_on, selective_scan
from gam_lm.ops.triton_there import triton_serves

Scan = Callable[..., tuple[Tensor, Tensor]]

HAS_NUMBA = find_spec("numba") is not None
"""Whether it can be imported. It is an extra, and is itself imported where it is used."""

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


def numba_selective_scan(
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
    """`selective_scan` by the library's own loops for a CPU (gam_lm.ops.selective_scan_cpu), which have no chunks.

    A single token is one step without a loop, which plain PyTorch takes.

    Raises:
        MissingExtraError: where numba is not installed.
        InputError: for what it has no kernel for: another device, fp64, a graph that is exported.
    """
    if not HAS_NUMBA:
        raise MissingExtraError("numba", "numba", "backend 'numba'")
    device, (B, T, _) = x_BTE.device.type, x_BTE.shape
    if device != "cpu":
        raise InputError(f"backend is 'numba' on {device}: it is compiled for the CPU, use backend='torch'")
    if any(each.dtype == torch.float64 for each in (x_BTE, dt_BTE, A_NE, B_BTN, C_BTN)):
        raise InputError("backend is 'numba' with float64: it has fp32, bf16 and fp16, use backend='torch'")
    if T <= 1 or B == 0:
        return selective_scan(x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, state_BNE, index_BT=index_BT)
    if torch.compiler.is_exporting():
        raise InputError("backend is 'numba' in a graph that is exported: the graph would need this library, use backend='torch'")
    goes_on_BT = x_BTE.new_ones(B, T, dtype=torch.float32) if index_BT is None else goes_on(index_BT).float()
    with torch.autocast(device, enabled=False):
        first_BNE = x_BTE.new_zeros(B, *A_NE.shape) if state_BNE is None else state_BNE
        y_BTE, last_BNE, _ = selective_scan_cpu.selective_scan(*(each.float() for each in (x_BTE, dt_BTE, A_NE, B_BTN, C_BTN, first_BNE)), goes_on_BT)
    return y_BTE, last_BNE


def automatic_backend(device_type: str, states: int, dtype: torch.dtype) -> str:
    """What "auto" takes: the kernels for the device where their compiler is installed and they have format and size, else plain PyTorch."""
    if device_type == "cpu" and dtype != torch.float64 and HAS_NUMBA:
        return "numba"
    return "triton" if triton_serves(device_type, dtype) and states <= MOST_STATES else "torch"


def scan_by(backend: str, device_type: str, states: int, dtype: torch.dtype) -> Scan:
    """The scan of a backend's name; an exported graph has none of a kernel unless one is named."""
    if backend == "auto":
        backend = "torch" if torch.compiler.is_exporting() else automatic_backend(device_type, states, dtype)
    return {"torch": selective_scan, "triton": triton_selective_scan, "numba": numba_selective_scan}[backend]
