"""`gam bench-gpu`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gam_lm.cli.flags import command_line
from gam_lm.cli.numbers import Above
from gam_lm.cli.terminal import show
from gam_lm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BenchGPU:
    """On one GPU: parity of the fast paths, Table 2, blocks up to 65,536 tokens, training at two sizes, decoding; the same command goes on."""

    out: Path = Path("results/gpu")
    """Folder for table.md and a folder for each part."""
    minutes: Above = 8.0
    """When to stop; what is under way then is finished."""
    device: str = "auto"
    """auto, cuda, cuda:1 …"""
    dry: bool = False
    """Every part at tiny sizes, on a CPU if need be: whether the command works."""

    def run(self) -> None:
        """Measure, then write tables and plots."""
        from gam_lm.experiments.gpu import DRY, FULL, bench_gpu
        from gam_lm.report.gpu import write_gpu
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device

        device = choose_device(self.device)
        if device.type != "cuda" and not self.dry:
            raise InputError(f"device is {device.type!r}: bench-gpu measures a GPU, use --dry to see on a CPU whether it works")
        machine = environment()

        def opened(part: str) -> Results:
            return Results.open(results_file(self.out / part), command=command_line(), environment=machine, corpus=None)

        failed = bench_gpu(DRY if self.dry else FULL, opened, device, seconds=60 * self.minutes)
        show(write_gpu(self.out))
        print(f"table: {self.out / 'table.md'}; tables and plots of each part below {self.out}")
        if failed:
            raise RuntimeError(f"{len(failed)} steps failed, their errors stand above: {'; '.join(failed)}")
