"""Which number formats a device multiplies natively, and what the write rules compute in."""

from __future__ import annotations

from pathlib import Path

import torch


def _cpu_flags() -> frozenset[str]:
    """The instructions that the processor has, as Linux tells them; elsewhere nothing is known, and fp32 is the safe choice."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.exists() else ())


# Read once: a compiled step must not open files.
_FLAGS = _cpu_flags()

CPU_HAS_BF16 = not _FLAGS.isdisjoint({"avx512_bf16", "amx_bf16"})
"""Whether bf16 products have instructions of their own."""

CPU_HAS_BF16_TILES = "amx_bf16" in _FLAGS
"""Whether they have a matrix unit. Without one, most products of many rows are slower than in fp32 (docs/log.md: about half as fast)."""

CPU_HAS_INT8 = not _FLAGS.isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Whether products of 8-bit integers have instructions of their own. Without them the libraries' sums of 16 bits may overflow."""

CPU_HAS_INT8_TILES = "amx_int8" in _FLAGS
"""Whether the libraries multiply them on a matrix unit, which is slow for a few rows: 147 µs where VNNI instructions took 29 (docs/log.md)."""


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively."""
    if device.type == "cpu":
        return CPU_HAS_BF16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def trains_faster_in_bf16(device: torch.device) -> bool:
    """Whether products of many rows are quicker in bf16 than in fp32."""
    return CPU_HAS_BF16_TILES if device.type == "cpu" else has_bf16(device)


def product_format(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format of a write rule's products for inputs of ``dtype``: fp32 on a processor without a matrix unit for it (emulated: 5 times as slow)."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and device.type == "cpu" and not (CPU_HAS_BF16_TILES and dtype == torch.bfloat16) else dtype
