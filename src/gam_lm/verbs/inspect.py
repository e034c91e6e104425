"""`gam inspect`: what a model is and does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gam_lm.errors import InputError

if TYPE_CHECKING:
    from gam_lm.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """How far back a model can see: by construction, and by changing one token at a time."""

    target: str
    """Run directory, or the name of a preset, of which an untrained model is measured."""
    model: str | None = None
    """Name of the model, where the target is a preset."""
    length: int | None = None
    """Tokens of the texts that are tried; by default 256, or as many as learned positions allow."""
    out: Path | None = None
    """Folder for receptive_field.svg and .png."""

    def run(self) -> None:
        """Measure and say it in words."""
        from gam_lm.diagnostics.receptive_field import explain, receptive_field
        from gam_lm.report.plots import receptive_field_plot

        model = model_of(self.target, self.model)
        field = receptive_field(model, length=self.length)
        print(explain(field, model.config))
        if self.out is not None:
            for picture in receptive_field_plot(field.effects, self.out / "receptive_field"):
                print(f"plot: {picture}")


def model_of(target: str, name: str | None) -> LanguageModel:
    """The model of a run directory, or an untrained one of a preset. Raises InputError where ``target`` is neither."""
    from gam_lm.checkpoint import load_model
    from gam_lm.config import ModelConfig
    from gam_lm.presets import PRESETS, named_model
    from gam_lm.training.loop import new_model

    if target in PRESETS:
        chosen = PRESETS[target]
        return new_model(named_model(name or chosen.models[0], ModelConfig(vocab_size=chosen.vocab_size, **chosen.model)), 0).eval()
    if not Path(target).exists():
        raise InputError(f"target is {target!r}, which is neither a run directory nor a preset ({', '.join(PRESETS)})")
    if name is not None:
        raise InputError(f"model is {name!r}, the run directory {target!r} has its own: leave --model out, or name a preset")
    return load_model(target)
