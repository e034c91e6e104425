"""`gam bench-decode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from gam_lm.cli.architecture import fields_of
from gam_lm.cli.measuring import Measuring
from gam_lm.cli.numbers import Above, Count
from gam_lm.presets.compared import DECODED

if TYPE_CHECKING:
    import torch

    from gam_lm.results import Results


@dataclass(frozen=True, kw_only=True)
class BenchDecode(Measuring):
    """Time one more token after long contexts, beside the limit that reading the weights sets; the same command goes on with what is missing."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is measured": ("models", "contexts", "batch_sizes", "precisions", "variants", "steps"),
        "Limits": ("limit_seconds", "limit_mb"),
        "Output": ("out",),
        "Machine": ("device",),
    }

    out: Path
    """Folder for results.json, table.md and decode*.svg and .png."""
    models: tuple[str, ...] = DECODED
    """Names of the models, sized to the parameters of the static GAM; hf:gpt2 is Transformers' own with its cache."""
    contexts: tuple[Count, ...] = (1_000, 10_000, 100_000)
    """Tokens before the one that is timed."""
    batch_sizes: tuple[Count, ...] = (1, 16)
    """Sequences at once."""
    precisions: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16")
    """Formats of the weights."""
    variants: tuple[Literal["eager", "compiled", "graph"], ...] = ("eager", "compiled")
    """How a step runs; compiled also packs the weights on a CPU, and is a CUDA graph on a GPU; graph is the eager step as a CUDA graph."""
    steps: Count = 40
    """Tokens that are timed after each context; their median counts."""
    warmup: Count = 5
    """Tokens before those."""
    limit_seconds: Above = 900.0
    """The most that the contexts of a model may take together before the longest is "over time"."""

    def measure(self, results: Results, device: torch.device) -> None:
        """See `Measuring.measure`."""
        from gam_lm.experiments.decode import Protocol, bench_decode

        protocol = Protocol(steps=self.steps, warmup=self.warmup, limit_seconds=self.limit_seconds, limit_mb=self.limit_mb)
        settings = [(precision, variant) for precision in self.precisions for variant in self.variants]
        bench_decode(self.models, self.contexts, self.batch_sizes, settings, fields_of(self.architecture), protocol, results, device)

    def write(self) -> str:
        """See `Measuring.write`."""
        from gam_lm.report.decode import write_decode

        return write_decode(self.out)
