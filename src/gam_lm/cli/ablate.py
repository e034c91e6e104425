"""`gam ablate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from gam_lm.cli.architecture import Architecture, config_of_flags, model_on_flags
from gam_lm.cli.data import Data
from gam_lm.cli.flags import FLAT, command_line, peek
from gam_lm.cli.numbers import Seed
from gam_lm.cli.terminal import show
from gam_lm.presets.setups import ABLATION, ablation_preset
from gam_lm.training.recipe import TrainConfig

DEFAULT = ABLATION["minutes"]


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Take the full model apart, one thing at a time, on the same tokens in the same order; the same command goes on with what is missing."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is compared": ("preset", "model", "rows", "seeds", "data"),
        "Training": ("steps", "batch_size"),
        "Output": ("out", "dry_run"),
        "Machine": ("device",),
    }

    out: Path
    """Folder for results.json, table.md, ablation.svg and .png, and the runs."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags: minutes (2 CPU cores), small-cpu (5 M parameters, hours) or paper (Table 3, a GPU)."""
    rows: tuple[str, ...] = DEFAULT.models
    """full, sum, global, local, global-gated, local-gated; FIELD=VALUE, which changes that field of the full model; or the groups published, gated, library."""
    seeds: tuple[Seed, ...] = DEFAULT.seeds
    """One training for each seed and row."""
    text: Annotated[Data, FLAT] = Data.of(DEFAULT)
    model: str = DEFAULT.full
    """The full model."""
    architecture: Architecture = model_on_flags(DEFAULT.full, {"vocab_size": DEFAULT.vocab_size, **DEFAULT.model})
    recipe: Annotated[TrainConfig, FLAT] = DEFAULT.train
    device: str = "auto"
    """auto, cpu, cuda …"""
    dry_run: bool = False
    """Print the plan, as JSON on the last line, and train nothing."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Ablate]:
        """A preset gives the defaults of the other flags."""
        setup = ablation_preset(peek(arguments, "--preset") or "minutes")
        full = peek(arguments, "--model") or setup.full
        architecture = model_on_flags(full, {"vocab_size": setup.vocab_size, **setup.model})
        return [cls(out=tyro.MISSING, rows=setup.models, seeds=setup.seeds, text=Data.of(setup), model=full, architecture=architecture, recipe=setup.train)]

    def run(self) -> None:
        """Train what is missing, then write table and plot."""
        from gam_lm.experiments.ablation import plan_ablation
        from gam_lm.experiments.benchmark import benchmark, describe_plan
        from gam_lm.report.ablation import ablation_plot, ablation_table
        from gam_lm.results import Results, read_results, results_file
        from gam_lm.runtime.files import write_text
        from gam_lm.runtime.measure import environment
        from gam_lm.training.loop import corpus_figures
        from gam_lm.training.precision import choose_device

        plan_ablation(self.rows, self.seeds, config_of_flags(self.architecture), self.recipe)  # a wrong name is told before the text is prepared
        device = choose_device(self.device)
        corpus = self.text.prepare(self.architecture.vocab_size)
        contenders = plan_ablation(self.rows, self.seeds, config_of_flags(self.architecture, vocab_size=corpus.vocab_size), self.recipe)
        if self.dry_run:
            rows = describe_plan(contenders, corpus, device)
            for row in rows:
                print(f"{row['model']}, seed {row['seed']}: {row['parameters']:,} parameters, {row['steps']} steps, about {row['expected_seconds']:.0f} s")
            print(json.dumps(rows))
            return
        path = results_file(self.out)
        results = Results.open(path, command=command_line(), environment=environment(), corpus=corpus_figures(corpus))
        benchmark(contenders, corpus, results, self.out, device)
        content = read_results(path)
        table = ablation_table(content, self.out)
        write_text(self.out / "table.md", table)
        show(table)
        print(f"runs:  {self.out / 'runs'}\ntable: {self.out / 'table.md'}")
        for picture in ablation_plot(content, self.out, self.out / "ablation"):
            print(f"plot:  {picture}")
