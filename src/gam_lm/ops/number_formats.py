"""Which number formats a device multiplies natively, and what the write rules compute in."""

from __future__ import annotations

from pathlib import Path

import torch


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively, as Linux tells it; elsewhere fp32 is the safe choice."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


CPU_HAS_BF16 = _cpu_has_bf16()
"""Read once: a compiled step must not open files."""


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively."""
    if device.type == "cpu":
        return CPU_HAS_BF16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def product_format(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format of a write rule's products for inputs of ``dtype``: fp32 on a processor that would emulate bf16 or fp16 (docs/log.md: 5 times as slow)."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and device.type == "cpu" and not (CPU_HAS_BF16 and dtype == torch.bfloat16) else dtype
