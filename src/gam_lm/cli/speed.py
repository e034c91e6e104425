"""`gam bench-train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gam_lm.cli.architecture import Architecture, on_flags
from gam_lm.cli.flags import check_bounds, command_line


@dataclass(frozen=True, kw_only=True)
class BenchTrain:
    """Time whole training steps, the plain way and ours, beside the machine's matmul peak; the same command goes on with what is missing."""

    out: Path
    """Folder for results.json, table.md, training_speed.svg and .png."""
    models: tuple[str, ...] = ("gam-static", "gam", "gam-mean", "gam-slots", "transformer", "mamba")
    """Names of the models, sized to the parameters of the static GAM."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Sequences per step."""
    context: int = 256
    """Tokens per sequence."""
    variants: tuple[Literal["plain", "eager", "compiled"], ...] = ("plain", "eager", "compiled")
    """Ways of taking a step; plain in fp32 and bf16, the others in bf16."""
    rounds: int = 5
    """Steps of each variant that are timed, in turns; their median counts."""
    warmup: int = 2
    """Steps before those."""
    limit_seconds: float = 2400.0
    """The most that a model may take at a batch size before it is "over time"."""
    limit_mb: float | None = None
    """The most memory of a process in MB before it is "out of memory"; by default 80 % of what is available."""
    architecture: Architecture = on_flags({})
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Measure what is missing, then write table and plot."""
        from gam_lm.experiments.training_speed import VARIANTS, Protocol, bench_train, matched
        from gam_lm.report.speed import write_speed
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device

        check_bounds(self, whole=("batch_sizes", "context", "rounds", "warmup"), positive=("limit_seconds", "limit_mb"))
        protocol = Protocol(rounds=self.rounds, warmup=self.warmup, limit_seconds=self.limit_seconds, limit_mb=self.limit_mb)
        variants = [each for each in VARIANTS if each[0] in self.variants]
        base = self.architecture.replace(max_position_embeddings=max(self.context, self.architecture.max_position_embeddings))
        device = choose_device(self.device)
        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        bench_train(matched(self.models, base), self.batch_sizes, self.context, variants, protocol, results, device)
        print(write_speed(self.out))
        print(f"table and plot: {self.out}")
