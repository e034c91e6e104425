"""`gam export`: a trained model for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model as ONNX or torch.export graphs of prefill and of one step, or as a run directory in int8."""

    run_directory: Path
    """Run directory of the model."""
    out: Path | None = None
    """Folder to write; by default beside the run, RUN-onnx, RUN-torch or RUN-int8."""
    format: Literal["onnx", "torch", "int8"] = "onnx"
    """onnx: prefill.onnx and step.onnx; torch: prefill.pt2 and step.pt2; int8: a run directory whose matrices have 8 bits,
    for gam eval, generate and serve."""

    def run(self) -> None:
        """Export, and say how far the result is from the model."""
        from gam_lm.export.write import export

        out = self.out or self.run_directory.with_name(f"{self.run_directory.name}-{self.format}")
        done = export(self.run_directory, self.format, out)
        print(f"weights: {done.bytes_before / 2**20:.2f} MB before, {done.bytes_after / 2**20:.2f} MB after")
        print(f"largest difference of a logit from the model's: {done.largest_difference:.1e}")
        if self.format == "int8":
            print(f"what it costs in quality: gam eval {out} --data …, beside gam eval {self.run_directory} --data …")
        print(f"export: {out}")
