"""`gam inspect`: what a model is and does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from gam_lm.cli.numbers import Count
from gam_lm.cli.terminal import show
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
    """What a model costs: parameters by part, operations and activations per token, bytes of state; also projected to 1 and 7 billion parameters.

    With --plan: what a training of that size takes on many GPUs, on paper.
    """

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model": ("target", "model", "context"),
        "A planned training": ("plan", "tokens", "gpus", "device", "plan_context", "tokens_per_step", "utilisation"),
        "Output": ("json",),
    }

    target: Annotated[str | None, tyro.conf.Positional] = None
    """Run directory, or the name of a preset; with --plan the kind of model, by default gam."""
    model: str | None = None
    """Name of the model, where the target is a preset."""
    context: tuple[Count, ...] = (256, 1024, 8192, 131_072, 1_048_576)
    """Tokens before the one that is decoded, and of a sequence in training."""
    plan: str | None = None
    """Parameters of a model to be trained, such as 350M or 1B."""
    tokens: str = "20B"
    """Of the planned training."""
    gpus: int = 8
    """Of the planned training."""
    device: str = "h100"
    """a100, h100, h200, b200."""
    plan_context: int = 4096
    """Tokens of a sequence of the planned training."""
    tokens_per_step: str = "1048576"
    """Of an optimiser step of the planned training."""
    utilisation: float = 0.4
    """Share of the GPU's peak that the planned training reaches."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self) -> None:
        """Count and print."""
        import json

        from gam_lm.diagnostics.cost import cost_report, explain

        if self.plan is not None:
            self._plan(self.plan)
            return
        if self.target is None:
            raise InputError("target is not given: name a run directory or a preset, or a size with --plan")
        report = cost_report(config_of(self.target, self.model), self.context)
        if self.json:
            print(json.dumps(report))
        else:
            show(explain(report))

    def _plan(self, size: str) -> None:
        """What a larger model of the kind takes on many GPUs."""
        import dataclasses
        import json

        from gam_lm.diagnostics.plan import Plan, describe, device_called, estimate, number, of_size
        from gam_lm.presets.models import DEFAULT_MODEL, named_model

        parameters = number("plan", size)
        base = named_model(self.model or DEFAULT_MODEL, {"vocab_size": VOCABULARY}) if self.target is None else config_of(self.target, self.model)
        plan = Plan(
            config=of_size(base, parameters), tokens=number("tokens", self.tokens), gpus=self.gpus, device=device_called(self.device),
            context=self.plan_context, tokens_per_step=number("tokens_per_step", self.tokens_per_step), utilisation=self.utilisation,
        )  # fmt: skip
        found = estimate(plan)
        if self.json:
            figures = dataclasses.asdict(found) | {"days": found.days(plan), "model_config": plan.config.to_dict()}
            print(json.dumps(figures))
        else:
            show(describe(plan, found))


VOCABULARY = 32_768
"""Of a planned model that no target gives."""


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
