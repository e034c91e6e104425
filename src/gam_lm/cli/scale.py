"""`gam scale`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import tyro

from gam_lm.cli.architecture import fields_of
from gam_lm.cli.flags import peek
from gam_lm.cli.measuring import Measuring
from gam_lm.cli.numbers import Above, Count
from gam_lm.presets.setups import SCALING, scale_preset

if TYPE_CHECKING:
    import torch

    from gam_lm.results import Results

DEFAULT = SCALING["cpu"]


@dataclass(frozen=True, kw_only=True)
class Scale(Measuring):
    """Measure one block of each model at each length, every cell in a process of its own; the same command goes on with what is missing."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is measured": ("preset", "models", "lengths", "batch_size", "precision", "compile"),
        "Limits": ("limit_seconds", "limit_mb"),
        "Output": ("out",),
        "Machine": ("device",),
    }

    out: Path
    """Folder for results.json, table.md, compute_time.svg and .png, peak_memory.svg and .png."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags: cpu, cpu-long, or table-2 (the paper's protocol)."""
    models: tuple[str, ...] = DEFAULT.models
    """Names of the models; transformer-learned+backend=materialised is the paper's code path, transformer-learned the fused one, hf:<type> one of transformers."""
    lengths: tuple[Count, ...] = DEFAULT.lengths
    """Tokens per sequence."""
    batch_size: Count = DEFAULT.batch_size
    """Sequences at once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Format of the matrix products; auto takes bf16 where the device computes it natively."""
    compile: bool = False
    """Run every block through torch.compile."""
    warmup: Count = DEFAULT.warmup
    """Passes that are not timed."""
    iterations: Count = DEFAULT.iterations
    """Passes that are timed; their median counts."""
    seconds: Above | None = DEFAULT.seconds
    """The most that warm-up, forward passes and training passes may take, each; by default as long as it takes."""
    limit_seconds: Above = DEFAULT.limit_seconds
    """The most that a cell may take before it is "over time"."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Scale]:
        """A preset gives the defaults of the other flags."""
        setup = scale_preset(peek(arguments, "--preset") or "cpu")
        return [cls(
            out=tyro.MISSING, models=setup.models, lengths=setup.lengths, batch_size=setup.batch_size, precision=setup.precision,  # type: ignore[arg-type]
            warmup=setup.warmup, iterations=setup.iterations, seconds=setup.seconds, limit_seconds=setup.limit_seconds,
        )]  # fmt: skip

    def measure(self, results: Results, device: torch.device) -> None:
        """See `Measuring.measure`."""
        from gam_lm.errors import InputError
        from gam_lm.experiments.measuring import emulated
        from gam_lm.experiments.scaling import Protocol, scale
        from gam_lm.training.precision import choose_dtype

        if reason := emulated(self.precision, device):
            raise InputError(f"precision is 'bf16', and {reason}: use fp32")
        dtype = self.precision
        if dtype == "auto":
            dtype = "bf16" if choose_dtype("auto", device).itemsize == 2 else "fp32"
        protocol = Protocol(
            batch_size=self.batch_size, dtype=dtype, compiled=self.compile, warmup=self.warmup, iterations=self.iterations, seconds=self.seconds,
            limit_seconds=self.limit_seconds, limit_mb=self.limit_mb,
        )  # fmt: skip
        scale(self.models, self.lengths, fields_of(self.architecture), protocol, results, device)

    def write(self) -> str:
        """See `Measuring.write`."""
        from gam_lm.report.scaling import write_scaling

        return write_scaling(self.out)
