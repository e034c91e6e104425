"""`gam export`: a trained model for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model as an ONNX or torch.export graph, as a run directory in int8, or as a page that runs it in a browser."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model": ("run_directory", "out"),
        "Format": ("format", "portable", "weights"),
        "Check": ("data",),
    }

    run_directory: Path
    """Run directory of the model."""
    out: Path | None = None
    """Folder to write, of a page the file; by default beside the run, RUN-onnx, RUN-torch, RUN-int8 or RUN.html."""
    format: Literal["onnx", "torch", "int8", "page"] = "onnx"
    """onnx: model.onnx, which takes any number of tokens; torch: prefill.pt2 and step.pt2; int8: a run directory whose matrices have 8 bits, for gam
    eval, generate and serve; page: one HTML file that generates text offline."""
    portable: bool = False
    """Of onnx: prefill.onnx and step.onnx of plain operators, for runtimes without the operator LinearAttention."""
    weights: Literal["fp32", "fp16", "int8"] | None = None
    """How the weights are stored: onnx fp32 (the default) or int8; page int8 (the default) or fp16."""
    note: str = ""
    """Of a page: a sentence under the title, such as what the model was trained on."""
    data: str | None = None
    """Corpus name or path on whose validation split int8 is measured beside the run itself."""

    def run(self) -> None:
        """Export, and say how far the result is from the model."""
        from gam_lm.export.write import export

        run = self.run_directory if self.run_directory.name not in ("", "..") else self.run_directory.resolve()
        out = self.out or run.parent / (f"{run.name}.html" if self.format == "page" else f"{run.name}-{self.format}")
        done = export(self.run_directory, self.format, out, portable=self.portable, weights=self.weights, note=self.note)
        print(f"weights: {done.bytes_before / 2**20:.2f} MB before, {done.bytes_after / 2**20:.2f} MB after")
        if done.largest_difference is not None:
            print(f"largest difference of a logit from the model's: {done.largest_difference:.1e}")
        if done.step_ms is not None:
            print(f"one step of decoding on this CPU: {done.step_ms[0]:.2f} ms before, {done.step_ms[1]:.2f} ms after")
            if self.data is None:
                print("what it costs in quality: give --data")
            else:
                before, after = (self._nats(folder, self.data) for folder in (self.run_directory, out))
                print(f"validation: {before:.4f} nats/token before, {after:.4f} after ({after - before:+.4f})")
        print(f"export: {out}")

    def _nats(self, folder: Path, data: str) -> float:
        from gam_lm.checkpoint import load_model
        from gam_lm.data.tokens import prepare
        from gam_lm.training.directory import trained_with
        from gam_lm.training.evaluate import evaluate

        model, recipe = load_model(folder), trained_with(folder)
        context = model.config.max_position_embeddings if recipe is None else recipe.context
        return evaluate(model, prepare(data, tokenizer=str(folder / "tokenizer.json")).splits["valid"], context=context).nats_per_token
