"""`gam train`: a model of anybody's text. What a run is going to be is decided in gam_lm.cli.training_job, what came of it is told by gam_lm.cli.outcome."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from gam_lm.cli.architecture import Architecture, model_on_flags
from gam_lm.cli.data import Data
from gam_lm.cli.flag_list import given
from gam_lm.cli.flags import FLAT, peek
from gam_lm.cli.numbers import Count
from gam_lm.errors import DivergedError
from gam_lm.presets.models import DEFAULT_MODEL
from gam_lm.presets.setups import preset
from gam_lm.training.plan import MINUTES
from gam_lm.training.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Make a language model of a text: `gam train my_text.txt`. Model, vocabulary and recipe follow from the text, the machine and --minutes; every flag
    overrides what follows. The same command goes on with a run that was stopped.
    """

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Text": ("texts", "chat", "from"),
        "Time": ("minutes", "steps"),
        "Model": ("model", "vocab_size", "hidden_size", "num_hidden_layers"),
        "Run": ("out", "device"),
    }
    planned: ClassVar[tuple[str, ...]] = (
        "vocab_size", "hidden_size", "num_hidden_layers", "dropout", "steps", "epochs", "batch_size", "context", "optimizer", "learning_rate",
        "muon_learning_rate", "schedule", "cooldown", "clip", "keep", "compile", "validate_every", "valid_tokens",
    )  # fmt: skip
    """Flags whose values follow from the text and the machine where there is no preset."""
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("texts", "data", "chat"), ("batch_size", "tokens_per_step"))
    """Flags of which a command has one alone."""

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Text files, folders, or the name of a corpus: .txt .md .py .jsonl, also as .gz and .zst, and .parquet. Several paths are one text."""
    minutes: float = MINUTES
    """What training may take, its validations included; preparing a text comes before, once."""
    out: Path | None = None
    """Run directory to write: by default runs/ and the name of the text."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Go on from the weights of this run directory on other text (fine-tuning); model and tokenizer stay."""
    chat: Path | None = None
    """Conversations to train on: a .jsonl with {"messages": [{"role": "user", "content": "…"}, …]} in each row. Only what the assistant says is learned."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags, in place of a plan."""
    model: str = DEFAULT_MODEL
    """Name of the model: gives the defaults of the architecture's flags."""
    text: Annotated[Data, FLAT] = Data()
    valid_tokens: int | None = None
    """Tokens of the validation split, from its start, that are measured; by default as many as take a small part of the time."""
    architecture: Architecture
    recipe: Annotated[TrainConfig, FLAT] = TrainConfig()
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    tokens_per_step: Count | None = None
    """Tokens of an optimiser step over all processes, in place of --batch-size; micro-batch and accumulation follow from the memory and are printed."""
    stream: bool = False
    """Read --data, a folder of parquet files or a data set of the Hub (NAME or NAME:CONFIGURATION), while training goes on, without preparing it whole."""
    shard: bool = False
    """Under torchrun: spread weights, gradients and optimiser state over the processes (FSDP2); the result is the same."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where figures go besides metrics.jsonl."""
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()
    """Names of the flags that were given."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Train]:
        """A preset gives the defaults of the other flags, and the model's name those of the architecture's."""
        chosen, name, named = peek(arguments, "--preset"), peek(arguments, "--model"), given(arguments)
        if chosen is None:
            name = name or DEFAULT_MODEL
            return [cls(model=name, architecture=model_on_flags(name, {"vocab_size": 10_000}), given=named)]
        setup = preset(chosen)
        name = name or setup.models[0]
        architecture = model_on_flags(name, {"vocab_size": setup.vocab_size, **setup.model})
        return [cls(preset=chosen, model=name, text=Data.of(setup), architecture=architecture, recipe=setup.train, given=named)]

    def run(self) -> None:
        """Plan, tell the plan, train, and tell what came of it."""
        from gam_lm.checkpoint import load_model
        from gam_lm.cli.outcome import tell
        from gam_lm.cli.run_page import RunPage
        from gam_lm.cli.training_job import Job, job_of
        from gam_lm.runtime.ownership import owned
        from gam_lm.training.directory import claim
        from gam_lm.training.distributed import joined
        from gam_lm.training.loop import fit
        from gam_lm.training.plan_words import batch_line, explain
        from gam_lm.training.planning import figures_of
        from gam_lm.training.precision import choose_device
        from gam_lm.training.trackers import make_tracker
        from gam_lm.training.watch import watched

        with joined(self.device) as (world, name):
            device = choose_device(name)

            def planned() -> Job:
                return job_of(self, device)

            def planned_for_all() -> Job:
                job = planned()
                if world.size > 1:  # the others read this plan: their own timed steps would give another
                    with owned(job.out):
                        claim(job.out, job.config, job.recipe, job.corpus, job.plan.to_dict())
                return job

            job = world.first(planned_for_all, then=planned)
            assert job is not None  # each rank has it
            figures = figures_of(job.config, job.recipe, job.whole, device)
            plan = list(explain(job.plan, job.recipe, figures))
            if world.rank == 0:
                if self.tokens_per_step is not None or world.size > 1:
                    plan.insert(-1, batch_line(job.recipe, world.size, self.tokens_per_step))
                print("\n".join(plan), flush=True)
            tracker = make_tracker("none" if world.rank else self.tracker, job.out, job.config.to_dict() | job.recipe.to_dict())
            model = job.fresh_model(device)
            page = RunPage(None if self.shard else model, job, plan, figures.steps, tracker)
            watch, watcher = (page.look, page) if world.rank == 0 else (None, tracker)
            fresh, started = not any((job.out / "state").glob("step-*")), time.monotonic()
            kept = job.keep_beside if world.rank == 0 else lambda: None
            try:
                with watched(world):
                    trained = fit(
                        model, job.corpus, job.recipe, job.out, tracker=watcher, label=job.plan.model, plan=job.plan.to_dict(), watch=watch,
                        shard=self.shard, stream=job.stream,
                    )  # fmt: skip
            except (KeyboardInterrupt, DivergedError):  # the directory is this run's; after a refusal it may be another's
                kept()
                raise
            kept()
            if world.rank == 0:
                if self.shard:
                    model = page.model = load_model(job.out, device=device)
                tell(trained, model, job, time.monotonic() - started if fresh else None, page)
