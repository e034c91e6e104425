"""`gam tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from gam_lm.cli.architecture import Architecture, fields_of, on_flags
from gam_lm.cli.data import Data
from gam_lm.cli.flags import FLAT, command_line, peek, share_out
from gam_lm.cli.numbers import Count, Natural
from gam_lm.cli.terminal import show
from gam_lm.presets.compared import COMPARED
from gam_lm.presets.setups import preset
from gam_lm.training.recipe import TrainConfig

SEED = 1000
"""Of the trials: no comparison uses it."""

SPACES = {"adamw": ("learning_rate=1e-3:1.6e-2",), "muon": ("muon_learning_rate=5e-3:8e-2", "learning_rate=2.5e-3:4e-2")}
"""By optimiser: what is searched where --search is not given."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Find the best recipe of each model: the same number of trials over the same ranges for all; the same command goes on with what is missing."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is tuned": ("preset", "models", "data", "search", "trials"),
        "Training": ("steps", "batch_size"),
        "Output": ("out",),
        "Machine": ("workers", "device"),
    }

    out: Path
    """Folder for results.json, table.md, tune.svg and .png, study.db and the runs."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags."""
    models: tuple[str, ...] = COMPARED
    """Names of the models."""
    search: tuple[str, ...] = ()
    """FIELD=LOW:HIGH of the recipe, searched on a logarithmic scale; by default the learning rates of the optimiser."""
    trials: Count = 5
    """Trials of each model."""
    widenings: Natural = 2
    """How often a range grows for all models where the best value of one lies at its edge."""
    prune: bool = False
    """End trials early that are behind the median at a validation."""
    storage: str | None = None
    """Address of a database for optuna, which many processes and machines may share; by default study.db in --out, for one process."""
    workers: int = 1
    """Processes that share the trials, each with its part of the cores or a GPU."""
    text: Annotated[Data, FLAT] = Data()
    architecture: Architecture = on_flags({})
    recipe: Annotated[TrainConfig, FLAT] = TrainConfig(seed=SEED)
    match_parameters: bool = True
    """Size every model to the parameters of the static GAM."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Tune]:
        """A preset gives the defaults of the other flags."""
        chosen = peek(arguments, "--preset")
        if chosen is None:
            return [cls(out=tyro.MISSING)]
        setup = preset(chosen)
        return [cls(
            out=tyro.MISSING, models=setup.models, text=Data.of(setup), architecture=on_flags({"vocab_size": setup.vocab_size, **setup.model}),
            recipe=setup.train.replace(seed=SEED), match_parameters=setup.match_parameters,
        )]  # fmt: skip

    def run(self) -> None:
        """Run what is missing, then write table and plot."""
        from filelock import FileLock, Timeout

        from gam_lm.errors import InputError
        from gam_lm.experiments.models import contender
        from gam_lm.experiments.search import Range
        from gam_lm.experiments.tune import Study, forget_dead_trials, tune
        from gam_lm.report.tune import write_study
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.runtime.workers import is_worker
        from gam_lm.training.loop import corpus_figures
        from gam_lm.training.precision import choose_device

        if self.prune and self.recipe.validate_every is None:
            raise InputError("prune is True, and the last validation is the only one: give --validate-every as well, or leave --prune out")
        space = tuple(Range.parse(each) for each in self.search or SPACES[self.recipe.optimizer])
        device = choose_device(self.device)
        corpus = self.text.prepare(self.architecture.vocab_size)
        base = fields_of(self.architecture) | {"vocab_size": corpus.vocab_size}
        models = dict(contender(name, base, match=self.match_parameters) for name in dict.fromkeys(self.models))
        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=corpus_figures(corpus))
        study = Study(models=models, recipe=self.recipe, space=space, trials=self.trials, widenings=self.widenings, prune=self.prune)
        storage = self.storage or f"sqlite:///{self.out / 'study.db'}"
        if is_worker():
            tune(study, corpus, results, self.out, device, storage=storage)
            return
        if self.storage is not None:
            if self.workers != 1:
                share_out(self.workers, self.out, device)
            tune(study, corpus, results, self.out, device, storage=storage)
        else:
            try:
                with FileLock(self.out / ".study.lock", timeout=0):
                    forget_dead_trials(storage, list(models))
                    if self.workers != 1:
                        share_out(self.workers, self.out, device)
                        forget_dead_trials(storage, list(models))
                    tune(study, corpus, results, self.out, device, storage=storage)
            except Timeout:
                raise InputError(f"out is {str(self.out)!r}, where another process tunes: wait for it, or share a database with --storage") from None
        show(write_study(self.out))
        print(f"table and plot: {self.out}")
