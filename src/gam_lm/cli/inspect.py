"""`gam inspect`: what a model is and does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gam_lm.cli.numbers import Count
from gam_lm.errors import InputError

if TYPE_CHECKING:
    from gam_lm.config import ModelConfig
    from gam_lm.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """How far back a model can see: by construction, and by changing one token at a time."""

    target: str
    """Run directory, or the name of a preset, of which an untrained model is measured."""
    model: str | None = None
    """Name of the model, where the target is a preset."""
    length: Count | None = None
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


@dataclass(frozen=True, kw_only=True)
class InspectCost:
    """What a model costs: parameters by part, operations and activations per token, bytes of state; also projected to 1 and 7 billion parameters."""

    target: str
    """Run directory, or the name of a preset."""
    model: str | None = None
    """Name of the model, where the target is a preset."""
    context: tuple[Count, ...] = (256, 1024, 8192, 131_072, 1_048_576)
    """Tokens before the one that is decoded, and of a sequence in training."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self) -> None:
        """Count and print."""
        import json

        from gam_lm.diagnostics.cost import cost_report, explain

        report = cost_report(config_of(self.target, self.model), self.context)
        print(json.dumps(report) if self.json else explain(report))


def config_of(target: str, name: str | None) -> ModelConfig:
    """The configuration of a run directory or of a preset's model. Raises InputError where ``target`` is neither."""
    from gam_lm.checkpoint import load_config
    from gam_lm.presets.models import named_model
    from gam_lm.presets.setups import PRESETS

    if target in PRESETS:
        chosen = PRESETS[target]
        return named_model(name or chosen.models[0], {"vocab_size": chosen.vocab_size, **chosen.model})
    if not Path(target).exists():
        raise InputError(f"target is {target!r}, which is neither a run directory nor a preset ({', '.join(PRESETS)})")
    if name is not None:
        raise InputError(f"model is {name!r}, the run directory {target!r} has its own: leave --model out, or name a preset")
    return load_config(Path(target))


def model_of(target: str, name: str | None) -> LanguageModel:
    """The model of a run directory, or an untrained one of a preset. Raises InputError where ``target`` is neither."""
    from gam_lm.checkpoint import load_model
    from gam_lm.presets.setups import PRESETS
    from gam_lm.training.loop import new_model

    config = config_of(target, name)
    return new_model(config, 0).eval() if target in PRESETS else load_model(target)
