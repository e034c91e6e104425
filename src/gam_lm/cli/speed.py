"""`gam bench-train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from gam_lm.cli.architecture import fields_of
from gam_lm.cli.measuring import Measuring
from gam_lm.cli.numbers import Above, Count
from gam_lm.presets.compared import TRAINED

if TYPE_CHECKING:
    import torch

    from gam_lm.results import Results


@dataclass(frozen=True, kw_only=True)
class BenchTrain(Measuring):
    """Time whole training steps, the plain way and ours, beside the machine's matmul peak; the same command goes on with what is missing."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is measured": ("models", "hidden_size", "num_hidden_layers", "batch_sizes", "context", "variants", "precisions", "rounds"),
        "Limits": ("limit_seconds",),
        "Output": ("out",),
        "Machine": ("device",),
    }

    out: Path
    """Folder for results.json, table.md, training_speed.svg and .png."""
    models: tuple[str, ...] = TRAINED
    """Names of the models, sized to the parameters of the static GAM."""
    batch_sizes: tuple[Count, ...] = (8, 32)
    """Sequences per step."""
    context: Count = 256
    """Tokens per sequence."""
    variants: tuple[Literal["plain", "eager", "compiled"], ...] = ("plain", "eager", "compiled")
    """Ways of taking a step."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ()
    """Number formats of every way; by default plain in both that the machine computes natively, the others in the one that is trained in."""
    rounds: Count = 5
    """Steps of each variant that are timed, in turns; their median counts."""
    warmup: Count = 2
    """Steps before those."""
    limit_seconds: Above = 2400.0
    """The most that a model may take at a batch size before it is "over time"."""

    def measure(self, results: Results, device: torch.device) -> None:
        """See `Measuring.measure`."""
        from gam_lm.experiments.training_speed import Protocol, bench_train, matched, variants_of

        protocol = Protocol(rounds=self.rounds, warmup=self.warmup, limit_seconds=self.limit_seconds, limit_mb=self.limit_mb)
        base = fields_of(self.architecture)
        base |= {"max_position_embeddings": max(self.context, base["max_position_embeddings"])}
        bench_train(matched(self.models, base), self.batch_sizes, self.context, variants_of(self.variants, device, self.precisions), protocol, results, device)

    def write(self) -> str:
        """See `Measuring.write`."""
        from gam_lm.report.speed import write_speed

        return write_speed(self.out)
