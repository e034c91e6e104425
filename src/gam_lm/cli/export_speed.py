"""`gam bench-export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from gam_lm.cli.architecture import fields_of
from gam_lm.cli.measuring import Measuring
from gam_lm.errors import InputError
from gam_lm.presets.models import DEFAULT_MODEL

if TYPE_CHECKING:
    import torch

    from gam_lm.results import Results


@dataclass(frozen=True, kw_only=True)
class BenchExport(Measuring):
    """Time the export to ONNX and the graphs in ONNX Runtime on the CPU: one graph against the portable two."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is measured": ("models", "hidden_size", "num_hidden_layers", "prompt_tokens", "rounds"),
        "Output": ("out",),
    }

    whole: ClassVar[tuple[str, ...]] = ("prompt_tokens", "rounds", "warmup")
    positive: ClassVar[tuple[str, ...]] = ()

    out: Path
    """Folder for results.json and table.md."""
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    """Names of the models; attention and Mamba have no portable form."""
    prompt_tokens: int = 101
    """Tokens of the prompt."""
    rounds: int = 20
    """Calls of each graph that are timed, in turns; their median counts."""
    warmup: int = 3
    """Calls before those."""

    def measure(self, results: Results, device: torch.device) -> None:
        """See `Measuring.measure`."""
        from gam_lm.experiments.export_speed import bench_export

        if self.limit_mb is not None:
            raise InputError(f"limit_mb is {self.limit_mb}: the export is measured in this process, leave the limit out")
        bench_export(self.models, fields_of(self.architecture), self.prompt_tokens, self.rounds, self.warmup, results)

    def write(self) -> str:
        """See `Measuring.write`."""
        from gam_lm.report.export import write_export

        return write_export(self.out)
