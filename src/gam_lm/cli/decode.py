"""`gam bench-decode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gam_lm.cli.architecture import Architecture, on_flags
from gam_lm.cli.flags import check_bounds, command_line


@dataclass(frozen=True, kw_only=True)
class BenchDecode:
    """Time one more token after long contexts, beside the limit that reading the weights sets; the same command goes on with what is missing."""

    out: Path
    """Folder for results.json, table.md and decode*.svg and .png."""
    models: tuple[str, ...] = ("gam-static", "gam", "gam-mean", "gam-slots", "transformer", "transformer", "mamba", "hf:gpt2")
    """Names of the models, sized to the parameters of the static GAM; hf:gpt2 is Transformers' own with its cache."""
    contexts: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Tokens before the one that is timed."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Sequences at once."""
    precisions: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16")
    """Formats of the weights."""
    variants: tuple[Literal["eager", "compiled", "graph"], ...] = ("eager", "compiled")
    """How a step runs; compiled also packs the weights on a CPU, and is a CUDA graph on a GPU; graph is the eager step as a CUDA graph."""
    steps: int = 40
    """Tokens that are timed after each context; their median counts."""
    warmup: int = 5
    """Tokens before those."""
    limit_seconds: float = 900.0
    """The most that the contexts of a model may take together before the longest is "over time"."""
    limit_mb: float | None = None
    """The most memory of a model in MB before its longest context is "out of memory"; by default 80 % of what is available."""
    architecture: Architecture = on_flags({})
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Measure what is missing, then write table and plots."""
        from gam_lm.experiments.decode import Protocol, bench_decode
        from gam_lm.report.decode import write_decode
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device

        check_bounds(self, whole=("contexts", "batch_sizes", "steps", "warmup"), positive=("limit_seconds", "limit_mb"))
        protocol = Protocol(steps=self.steps, warmup=self.warmup, limit_seconds=self.limit_seconds, limit_mb=self.limit_mb)
        settings = [(precision, variant) for precision in self.precisions for variant in self.variants]
        device = choose_device(self.device)
        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        bench_decode(self.models, self.contexts, self.batch_sizes, settings, (self.architecture), protocol, results, device)
        print(write_decode(self.out))
        print(f"table and plots: {self.out}")
