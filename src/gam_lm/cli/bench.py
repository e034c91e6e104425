"""`gam bench`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from tyro.conf import Suppress, UseAppendAction

from gam_lm.cli.architecture import Architecture, fields_of, on_flags
from gam_lm.cli.data import Data, EvaluationText
from gam_lm.cli.flags import FLAT, command_line, peek, share_out
from gam_lm.cli.numbers import Above, Seed
from gam_lm.cli.terminal import show
from gam_lm.errors import InputError
from gam_lm.presets.compared import COMPARED
from gam_lm.presets.setups import preset
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

PARTS = {"paper": ("paper-wikitext2", "paper-tinystories")}
"""Presets of several setups, each in a folder of its own below --out."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Train several models on the same tokens in the same order and compare them; the same command goes on with what is missing.

    A number of the recipe or the model may have several values (--learning-rate 1e-3 2e-3 4e-3): every model is trained with each, and the best is said.
    """

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is compared": ("preset", "models", "seeds", "data", "tuned"),
        "Training": ("steps", "batch_size"),
        "Output": ("out", "dry_run"),
        "Machine": ("workers", "device"),
    }

    out: Path
    """Folder for results.json, table.md, loss_curves.svg and .png, and the runs."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags; paper is both paper setups."""
    models: tuple[str, ...] = COMPARED
    """Names of the models; hf:llama, hf:mamba2 … are those of transformers, at the same size."""
    seeds: tuple[Seed, ...] = (0,)
    """One row for each seed and model."""
    text: Annotated[Data, FLAT] = Data()
    architecture: Architecture = on_flags({})
    recipe: Annotated[TrainConfig, FLAT] = TrainConfig()
    match_parameters: bool = True
    """Size every model to the parameters of the static GAM."""
    test: bool = False
    """Measure the test split of every finished model as well."""
    texts: tuple[EvaluationText, ...] = ()
    """Further texts to measure every finished model on, in its own tokens: encyclopaedia, stories, plays, passages of novels, technical prose."""
    primary: UseAppendAction[tuple[str, ...]] = ()
    """MODEL:MODEL of a primary comparison, given once for each, at most three: saved before the runs of one of the two, compared without Holm's correction."""
    margin: Above | None = None
    """Nats per token that count as no loss of the first of a primary comparison (0.02): saved before the runs."""
    tuned: Path | None = None
    """Folder of a study of `gam tune`, of which every model takes its best recipe."""
    timing: bool = True
    """Measure the speed columns at the end; leave it out on a machine that does something else beside."""
    device: str = "auto"
    """auto, cpu, cuda …"""
    workers: int = 1
    """Processes that share the rows, each with its part of the cores or a GPU."""
    dry_run: bool = False
    """Print the plan, as JSON on the last line, and train nothing."""
    part: Suppress[str] = ""
    """Folder below ``out``, for a preset of several setups."""
    sweep: Suppress[Any] = field(default_factory=dict)
    """Fields of the recipe or the model with several values, as `gam_lm.cli.sweep.take_sweep` found them."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Bench]:
        """A preset gives the defaults of the other flags."""
        chosen = peek(arguments, "--preset")
        if chosen is None:
            return [cls(out=tyro.MISSING)]
        found = []
        for name in PARTS.get(chosen, (chosen,)):
            setup = preset(name)
            architecture = on_flags({"vocab_size": setup.vocab_size, **setup.model})
            part = name.removeprefix("paper-") if chosen in PARTS else ""
            found.append(cls(
                out=tyro.MISSING, models=setup.models, seeds=setup.seeds, text=Data.of(setup), architecture=architecture, recipe=setup.train,
                match_parameters=setup.match_parameters, part=part,
            ))  # fmt: skip
        return found

    def run(self) -> None:
        """Train what is missing, then write table and plot."""
        from gam_lm.data.corpora import load_corpus
        from gam_lm.experiments.benchmark import benchmark, describe_plan, plan
        from gam_lm.experiments.same_study import check_corpus, check_not_tuned, told_apart
        from gam_lm.experiments.search import best_recipe
        from gam_lm.experiments.sweep import best_of_sweep, sweep, values_said
        from gam_lm.report.compare import primary_pairs
        from gam_lm.results import Results, read_results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.runtime.workers import is_worker
        from gam_lm.training.loop import corpus_figures
        from gam_lm.training.precision import choose_device

        primary = primary_pairs(self.primary, self.models)
        device = choose_device(self.device)
        corpus = self.text.prepare(self.architecture.vocab_size)
        for name in self.texts:
            load_corpus(name)  # one that is not at hand is said before hours of training
        base = fields_of(self.architecture) | {"vocab_size": corpus.vocab_size}
        if self.sweep:
            if self.primary:
                raise InputError(f"{next(iter(self.sweep))} has several values, which does not go with --primary: give one value, or leave it out")
            contenders = sweep(self.sweep, self.models, self.seeds, base, self.recipe, match=self.match_parameters)
        else:
            contenders = plan(self.models, self.seeds, base, self.recipe, match=self.match_parameters)
        if self.tuned is not None:
            study = read_results(self.tuned / "results.json")
            check_corpus(study, corpus_figures(corpus), self.tuned)
            check_not_tuned(study["rows"], self.sweep, self.tuned)
            contenders = [replace(each, recipe=best_recipe(study["rows"], each.name, each.recipe, self.tuned)) for each in contenders]
            for difference in told_apart(study["rows"], {each.name: (each.config, each.recipe) for each in contenders}, self.sweep):
                logger.warning("--tuned: %s", difference)
        if self.dry_run:
            planned = describe_plan(contenders, corpus, device)
            for row in planned:
                print(
                    f"{row['model']}{values_said(row)}, seed {row['seed']}: {row['parameters']:,} parameters, {row['steps']} steps, about {row['expected_seconds']:.0f} s"
                )
            print(json.dumps(planned))
            return
        out = self.out / self.part
        path = results_file(out)
        results = Results.open(path, command=command_line(), environment=environment(), corpus=corpus_figures(corpus))
        results.name_primary(primary, self.margin)
        if is_worker():
            benchmark(contenders, corpus, results, out, device, test=self.test, texts=self.texts, timed=False)
            return
        if self.workers != 1:
            share_out(self.workers, out, device)
        benchmark(contenders, corpus, results, out, device, test=self.test, texts=self.texts, timed=self.timing)
        _show(out)
        if self.sweep:
            for line in best_of_sweep(contenders, results, device):
                print(line)


def _show(out: Path) -> None:
    """Write and print table and plot."""
    from gam_lm.report.law import law_plots, law_tables
    from gam_lm.report.plots import loss_curves
    from gam_lm.report.tables import quality_table, text_tables
    from gam_lm.results import read_results
    from gam_lm.runtime.files import write_text

    results = read_results(out / "results.json")
    further = [*text_tables(results), *law_tables(results)]
    table = "\n".join([quality_table(results, out), *(f"**{each.title}**\n\n{each.markdown()}" for each in further)])
    write_text(out / "table.md", table)
    show(table)
    print(f"runs:  {out / 'runs'}\ntable: {out / 'table.md'}")
    for picture in loss_curves(results, out / "loss_curves") + law_plots(results, out):
        print(f"plot:  {picture}")
