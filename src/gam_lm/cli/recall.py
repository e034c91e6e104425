"""`gam recall`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from gam_lm.cli.architecture import Architecture, fields_of, on_flags
from gam_lm.cli.flags import FLAT, command_line, peek, share_out
from gam_lm.cli.numbers import Count, Seed
from gam_lm.cli.terminal import show
from gam_lm.errors import InputError
from gam_lm.presets.setups import RECALL, recall_preset
from gam_lm.training.recipe import TrainConfig

DEFAULT = RECALL["minutes"]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Train models on synthetic recall and measure what they find again, against the size of their state."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is compared": ("preset", "models", "seeds"),
        "Task": ("task", "pairs", "length", "filler", "test_lengths", "stop_at"),
        "Output": ("out",),
        "Machine": ("workers", "device"),
    }

    out: Path
    """Folder for results.json, table.md and recall*.svg and .png."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags: minutes (2 CPU cores) or zoology (the paper's sizes, a GPU)."""
    models: tuple[str, ...] = DEFAULT.models
    """Names of the models; hf:llama, hf:mamba2 … are those of transformers, at the same size."""
    task: str = "mqar"
    """mqar, zoology (as its authors draw it), forgetting, copying, induction; or a state to track: parity, permutations."""
    pairs: tuple[Count, ...] = DEFAULT.pairs
    """Pairs per sequence."""
    length: tuple[Count, ...] = DEFAULT.length
    """Tokens per sequence: one number for all, or one for each number of pairs."""
    gap_power: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Exponent of the power law of the gaps: near 0 most are short, 1 is uniform."""
    filler: str = "random"
    """Between pairs and questions: random (ids that look like pairs) or blank (one id that is never a key)."""
    test_lengths: tuple[Count, ...] = ()
    """Further lengths at which to measure what was learned at `--length`, without training there."""
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of right answers at which a training has learned its task and stops, looked at every 50 steps; without it all steps are taken."""
    seeds: tuple[Seed, ...] = (0,)
    """One row for each seed, model and size."""
    trials: Annotated[int, Field(ge=0)] = 0
    """Trials of every model on every task, at the same points for all; the seeds then train with the best. 0 takes the recipe as it is."""
    search: tuple[str, ...] = ("learning_rate=1e-3:3e-2",)
    """FIELD=LOW:HIGH of the recipe, what the trials try, on a logarithmic scale."""
    architecture: Architecture = on_flags({"vocab_size": DEFAULT.vocab_size, **DEFAULT.model})
    recipe: Annotated[TrainConfig, FLAT] = DEFAULT.train
    match_parameters: bool = True
    """Size every model to the parameters of the static GAM."""
    device: str = "auto"
    """auto, cpu, cuda …"""
    workers: int = 1
    """Processes that share the rows, each with its part of the cores or a GPU."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Recall]:
        """A preset gives the defaults of the other flags."""
        setup = recall_preset(peek(arguments, "--preset") or "minutes")
        architecture = on_flags({"vocab_size": setup.vocab_size, **setup.model})
        return [cls(out=tyro.MISSING, models=setup.models, pairs=setup.pairs, length=setup.length, architecture=architecture, recipe=setup.train)]

    def run(self) -> None:
        """Train what is missing, then write table and plot."""
        from gam_lm.experiments.models import contender
        from gam_lm.experiments.recall import recall
        from gam_lm.experiments.recall_tasks import RecallTask
        from gam_lm.experiments.search import Range, Search
        from gam_lm.report.recall import write_recall
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.runtime.workers import is_worker
        from gam_lm.training.precision import choose_device

        if len(self.length) not in (1, len(self.pairs)):
            raise InputError(f"length has {len(self.length)} numbers and pairs {len(self.pairs)}: give one for all, or one for each")
        lengths = self.length * len(self.pairs) if len(self.length) == 1 else self.length
        tasks = [
            RecallTask(task=self.task, pairs=pairs, length=length, vocab=self.architecture.vocab_size, gap_power=self.gap_power, filler=self.filler)
            for pairs, length in zip(self.pairs, lengths, strict=True)
        ]
        models = [contender(name, fields_of(self.architecture), match=self.match_parameters) for name in dict.fromkeys(self.models)]
        path = results_file(self.out)
        results = Results.open(path, command=command_line(), environment=environment(), corpus=None)
        search = Search(space=tuple(map(Range.parse, self.search)), trials=self.trials) if self.trials else None
        device = choose_device(self.device)
        if self.workers != 1 and not is_worker():
            share_out(self.workers, self.out, device)
        recall(models, tasks, self.seeds, self.recipe, results, device, test_lengths=self.test_lengths, search=search, stop_at=self.stop_at)
        if is_worker():
            return
        show(write_recall(self.out))
        print(f"table and plots: {self.out}")
