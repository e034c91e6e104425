"""What the machine is and what it can do: the figures that stand beside every measured one."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    resource = None
else:
    import resource

if TYPE_CHECKING:
    import torch

BYTES_PER_MB = 2**20

NOMINAL_BF16_FLOPS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Dense bf16 FLOP/s of a GPU by its maker's data sheet, by what its name holds, the longer name first: what model FLOPs utilisation (MFU) is a share of."""


def environment() -> dict[str, Any]:
    """Where a figure comes from: device, processor, cores, memory_gb (2³⁰ bytes), python, torch, commit, dirty."""
    import torch

    commit, dirty = _commit()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the source checkout and whether it was changed; None for an installed package."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))


SETTLED_FAULTS = 100
"""Page faults of a call that no longer counts as asking the system for memory."""


def step_times(
    step: Callable[[], object], device: torch.device, *, warmup: int = 5, iterations: int = 20, seconds: float | None = None
) -> list[float]:
    """Milliseconds of each call of ``step``, the device's work included.

    Args:
        step: what is timed.
        device: where it works.
        warmup: calls that are not timed, as of `warm_up`.
        iterations: calls that are timed.
        seconds: where given, the most that the timing may take, and the warm-up unless it asks for memory; one timed call is always made.
    """
    warm_up(step, device, warmup, seconds)
    taken: list[float] = []
    while len(taken) < iterations and (not taken or seconds is None or sum(taken) < seconds):
        taken.append(_seconds_of(step, device))
    return [1000 * each for each in taken]


def warm_up(step: Callable[[], object], device: torch.device, calls: int, seconds: float | None = None) -> None:
    """Call ``step`` up to ``calls`` times, for ``seconds`` at most, and beyond those as long as the process still asks the system for memory.

    At 65,536 tokens the first three passes of a block grow the heap, which costs up to half of their time; the passes of a training after them do not.
    """
    synchronize(device)
    taken = 0.0
    for _ in range(calls):
        before = _page_faults()
        taken += _seconds_of(step, device)
        if seconds is not None and taken >= seconds and _page_faults() - before < SETTLED_FAULTS:
            return


def _seconds_of(step: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def _page_faults() -> int:
    """Pages that this process got from the system so far; 0 where the system does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource is not None else 0


def interleaved_times(steps: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int = 2, rounds: int = 10) -> dict[str, list[float]]:
    """Milliseconds of each call of several steps that take turns, so that what else the machine does meets all alike."""
    for step in steps.values():
        warm_up(step, device, warmup)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name] += step_times(step, device, warmup=0, iterations=1)
    return taken


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def cuda_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that the allocator of a GPU held at most during ``step``, parameters and inputs included."""
    import torch

    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def matmul_peak(device: torch.device, dtype: torch.dtype, *, sizes: tuple[int, ...] | None = None, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest square matrix product, a multiply-add counting as two: what the machine gives in practice, not what its maker says.

    Args:
        device: where.
        dtype: of both factors and the product.
        sizes: edges of the matrices that are tried; by default 1024 and 2048, on a GPU 4096 and 8192.
        seconds: spent on each size.
    """
    import torch

    best = 0.0
    for n in sizes or ((4096, 8192) if device.type == "cuda" else (1024, 2048)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = step_times(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, warmup=3, iterations=200, seconds=seconds)  # type: ignore[misc]
        best = max(best, 2 * n**3 / (statistics.median(times) / 1000))
    return best


def nominal_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of ``device`` by its maker's data sheet; None where it is not known here."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in NOMINAL_BF16_FLOPS.items() if part in name), None)


MEMORY_READ = 1 << 29
"""Bytes that hardly any cache holds."""


def memory_bandwidth(device: torch.device, size: int = MEMORY_READ, *, seconds: float = 1.0) -> float:
    """Bytes per second at which this machine reads memory, by the fastest of three ways: a sum, a scalar product, a copy within ``size`` bytes.

    What fits into a cache is read faster, at a speed that changes from process to process with the pages it gets; give more than the caches hold.
    """
    import torch

    x = torch.ones(max(2, size // 4), device=device)
    half = len(x) // 2
    ways: tuple[Callable[[], object], ...] = (x.sum, lambda: torch.dot(x, x), lambda: x[:half].copy_(x[-half:]))  # the copy reads and writes a half
    best = 0.0
    for way in ways:
        times = step_times(way, device, warmup=2, iterations=1000, seconds=seconds)
        best = max(best, x.nbytes / (statistics.median(times) / 1000))
    return best
