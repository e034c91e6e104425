"""Train one model: the same tokens in the same order for every model, and a run that was stopped anywhere goes on as the same run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch

from gam_lm.checkpoint import load_model
from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import DivergedError, InputError
from gam_lm.model import LanguageModel
from gam_lm.runtime.ownership import owned
from gam_lm.runtime.progress import progress
from gam_lm.training.averaging import Average
from gam_lm.training.batches import Stream, batches_of, check_fits
from gam_lm.training.compiled import compile_for_training, make_eager
from gam_lm.training.directory import Metrics, check_claimable, claim
from gam_lm.training.directory import corpus_figures as corpus_figures
from gam_lm.training.distributed import DataParallel, World, check_batch, own_randomness
from gam_lm.training.divergence import broken_weight, validation_diverged
from gam_lm.training.evaluate import Evaluation, evaluate
from gam_lm.training.interruption import Abandoned, Interruption, signals_held
from gam_lm.training.new import new_model as new_model
from gam_lm.training.optimizers import make_optimizer as make_optimizer
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.saving import Saving
from gam_lm.training.sharding import put
from gam_lm.training.sharding import shard as shard_model
from gam_lm.training.state import Progress, generators, load_state, set_generators
from gam_lm.training.step import train_step as train_step
from gam_lm.training.trackers import NoTracker, Tracker
from gam_lm.training.trained import Trained as Trained

logger = logging.getLogger("gam_lm")

Watch = Callable[[int, Evaluation], Mapping[str, object]]

LOG_EVERY = 10
SECONDS_BETWEEN_STATES = 60.0
SHARE_OF_SAVING = 0.05
"""Largest share of the time that the saving by the clock may take: where writing a state takes more than three seconds, it is done less often."""


def fit(
    model: LanguageModel,
    corpus: TokenCorpus,
    recipe: TrainConfig,
    directory: Path,
    *,
    tracker: Tracker | None = None,
    label: str = "train",
    plan: Mapping[str, object] | None = None,
    watch: Watch | None = None,
    shard: bool = False,
    stream: Stream | None = None,
) -> Trained:
    """Train ``model`` in place and write its run directory as it goes.

    Where torch.distributed has a process group, all its processes make the same call, and train the one model together (see gam_lm.training.distributed).

    Args:
        model: freshly built by `new_model`; where ``directory`` holds the state of a killed run it is put back to that. With ``recipe.ema`` it holds the
            averaged weights afterwards.
        corpus: prepared tokens with the splits train and valid.
        recipe: how to train.
        directory: the run directory; see gam_lm.checkpoint. No other process may write it meanwhile.
        tracker: takes the figures besides metrics.jsonl; started when the directory is this run's.
        label: names the run on the progress bar.
        plan: kept in recipe.json, for a command that goes on with the run.
        watch: called in every validation within the run, with the step and what was found, while the model has the weights that were validated. What it
            returns, JSON values, goes into that line of metrics.jsonl. It must leave the model and the global random generators as they are.
        stream: read the training batches from this data set, whose tokenizer and validation split ``corpus`` has.
        shard: spread weights, gradients and moments over the processes (gam_lm.training.sharding); ``model`` stays so, the run directory has it whole.

    Raises:
        InputError: for a directory of another run or process, a context longer than the model's positions, or a split shorter than one block.
        DivergedError: where loss, gradient or weights are not finite; the last state with finite weights is kept.
        KeyboardInterrupt: on SIGINT or SIGTERM, between two steps, after the state has been saved.
    """
    check_fits(model.config, corpus, recipe)
    check_batch(recipe.batch_size, World.current(), shard=shard)
    if shard:
        shard_model(model, model.embed_tokens.weight.device)
    with ExitStack() as held:

        def take() -> None:
            check_claimable(directory)
            held.enter_context(owned(directory))
            claim(directory, model.config, recipe, corpus, plan)

        World.current().first(take)
        with signals_held() as interruption:
            return _Run(model, corpus, recipe, directory, tracker or NoTracker(), label, interruption, watch, stream).train()


class _Run:
    """One call of `fit`."""

    def __init__(
        self, model: LanguageModel, corpus: TokenCorpus, recipe: TrainConfig, directory: Path, tracker: Tracker, label: str, interruption: Interruption,
        watch: Watch | None, stream: Stream | None,
    ) -> None:  # fmt: skip
        self.model, self.corpus, self.recipe, self.directory, self.label = model, corpus, recipe, directory, label
        self.interruption, self.watch, self.world = interruption, watch, World.current()
        self.tracker = NoTracker() if self.world.rank else tracker
        self.device = model.embed_tokens.weight.device
        self.dtype = choose_dtype(recipe.precision, self.device)
        self.optimizer = make_optimizer(model, recipe, self.world.size)
        self.average = Average(model, recipe.ema) if recipe.ema else None
        reached = load_state(directory, model, self.optimizer, None if self.average is None else self.average.tensors) or Progress()
        self.batches = batches_of(corpus, recipe, stream, self.world.rank, self.world.size, reached.stream)
        self.total = recipe.total_steps(self.batches.steps_per_epoch)
        self.step, self.recorded, self.tokens, self.seconds = reached.step, reached.recorded, reached.tokens, reached.seconds
        self.curve, self.pending, self.norm = list(reached.curve), list(reached.pending), reached.gradient_norm
        if len(set(self.world.gather(self.step))) > 1:
            raise InputError(f"out is {str(directory)!r}, which not all processes see alike: use a folder that they share")
        self.metrics = None if self.world.rank else Metrics(directory / "metrics.jsonl", self.recorded)
        self.tracker.start(self.recorded)
        self.parallel = DataParallel(model, self.world)
        self.saving = Saving(directory, model, self.optimizer, self.average, corpus.tokenizer, self.world)
        self.validation: Evaluation | None = None
        self.last: Evaluation | None = None
        self.note = ""
        self.saved, self.spent = time.monotonic(), 0.0

    def train(self) -> Trained:
        """All steps that are left."""
        self.compiled = compile_for_training(self.model, self.recipe, self.total)
        self.model.train()
        try:
            with progress(self.label, self.total, "steps", done=self.step) as bar:
                while True:
                    self._record()
                    if self.step >= self.total:
                        break
                    stop, due = self.world.each(self.interruption.requested, self._state_is_due())
                    if stop:
                        raise Abandoned
                    if due:
                        self._save(model=False)
                    self._step()
                    self.saving.poll()
                    bar.advance(1, self.note)
            if self.validation is None:  # killed between the last record and the end
                self.validation = self._validate()
            self._save()
            self.saving.finish()
            kept_step = self._keep()
        except Abandoned:
            self._save()
            self.saving.finish()
            logger.info("interrupted after step %d of %d; the same command goes on from there", self.step, self.total)
            raise KeyboardInterrupt from None
        finally:
            make_eager(self.compiled)
            self.batches.close()
            self.tracker.finish()
        return Trained(
            steps=self.step, tokens=self.tokens, seconds=self.seconds, curve=self.curve, validation=self.validation,
            precision=str(self.dtype).removeprefix("torch."), compiled=bool(self.compiled), kept_step=kept_step, last=self.last,
        )  # fmt: skip

    def _step(self) -> None:
        started = time.perf_counter()
        before, rate = generators(), self.recipe.rate(self.step, self.total)
        own_randomness(self.recipe.seed, self.step, self.world)
        batch = self.batches.batch(self.step)
        try:
            loss, norm, counted = train_step(self.model, self.optimizer, batch, self.recipe, rate, self.dtype, self.parallel)
        except DivergedError as error:
            set_generators(before)
            if broken_weight(self.model) is None:
                self._save()
                self.saving.finish()
            raise error.at(self.step) from None
        self.pending.append(float(loss))
        self.norm = float(norm)
        self.step += 1
        self.tokens += counted
        if self.average is not None:
            self.average.update(self.step)
        self.seconds += time.perf_counter() - started

    def _measures(self, step: int) -> bool:
        """Whether a validation follows ``step``."""
        return step == self.total or (self.recipe.validate_every is not None and step % self.recipe.validate_every == 0)

    def _record(self) -> None:
        """Write the metrics of the last step, where it is the turn of that and it was not done. Raises Abandoned with nothing changed."""
        step = self.step
        if step == self.recorded:
            return
        measures = self._measures(step)
        if measures or step % LOG_EVERY == 0:
            figures = {"train_nats": float(torch.tensor(self.pending).mean()), "learning_rate": self._last_rate, "gradient_norm": self.norm}
            seen: Mapping[str, object] = {}
            if measures:
                self.validation = self._validate()
                if self.watch is not None:
                    with self._averaged(), self._eager():
                        seen = self.watch(step, self.validation)
                figures["val_nats"] = self.validation.nats_per_token
                self.curve.append(self._place() | {"train_nats": figures["train_nats"], "val_nats": figures["val_nats"]})
                if self.recipe.keep == "best" and step < self.total and self._best_step == step:
                    self.saving.best(self._best_folder)
                logger.info(
                    "%s: step %d/%d, train %.4f, validation %.4f nats/token", self.label, step, self.total, figures["train_nats"], figures["val_nats"]
                )
            self.pending.clear()
            if self.metrics is not None:
                self.metrics.append(self._place() | figures | dict(seen))
            self.tracker.log(figures, step)
            self.note = f"loss {figures['train_nats']:.3f}"
        self.recorded = step
        if measures and step < self.total:
            self._save()

    @property
    def _best_step(self) -> int:
        """Of the best validation so far; of equal ones the first."""
        return int(min(self.curve, key=lambda point: point["val_nats"])["step"])

    @property
    def _best_folder(self) -> Path:
        """The weights of the best validation so far; it is of one step, and stays until a state is written that knows of a better one."""
        return self.directory / "state" / f"best-{self._best_step:08d}"

    def _keep(self) -> int:
        """Give the model the weights that the run ends with, write them where they are not the last ones, and return their step."""
        if self.average is not None:
            self.average.hand_over()
        if self.recipe.keep == "last" or self._best_step == self.step:
            return self.step
        self.last = self.validation
        put(self.model.state_dict(), load_model(self._best_folder).state_dict())
        self.average = None  # it was handed over, and what is kept now is another
        self.validation = self._validate()
        self.saving.kept()
        return self._best_step

    def _validate(self) -> Evaluation:
        """Within the run in the format of the products, at its end in that of the weights."""
        with self._averaged(), self._eager(), progress(f"{self.label}: validation", None, "blocks") as bar:

            def advance(blocks: int) -> None:
                if self.world.size == 1:  # several processes have different numbers of batches: they stop together, after the validation
                    self.interruption.check()
                bar.advance(blocks)

            found = evaluate(
                self.model, self.corpus.splits["valid"], context=self.recipe.context, overlap=self.recipe.blocks == "overlapping",
                dtype=torch.float32 if self.step == self.total else self.dtype, advance=advance, world=self.world,
            )  # fmt: skip
        if not math.isfinite(found.nats_per_token):
            overlap = self.recipe.blocks == "overlapping"
            raise validation_diverged(self.model, self.corpus.splits["valid"], self.recipe.context, self._last_rate, overlap=overlap).at(self.step - 1)
        return found

    @property
    def _last_rate(self) -> float:
        return self.recipe.rate(max(0, self.step - 1), self.total)

    def _state_is_due(self) -> bool:
        """The first process's clock counts for all."""
        if self.step % self.recipe.checkpoint_every == 0 and self.step:
            return True
        return not self.world.rank and time.monotonic() - self.saved > max(SECONDS_BETWEEN_STATES, self.spent / SHARE_OF_SAVING)

    def _save(self, *, model: bool = True) -> None:
        """Write the state from which the run goes on, and the ``model``. Raises DivergedError where weights are not finite."""
        started = time.monotonic()
        if (weight := broken_weight(self.model)) is not None:
            raise DivergedError("a weight", weight, self._last_rate, self.step - 1)
        if self.metrics is not None:
            self.metrics.sync()
        reached = Progress(
            step=self.step, recorded=self.recorded, tokens=self.tokens, seconds=self.seconds, curve=tuple(self.curve), pending=tuple(self.pending),
            gradient_norm=self.norm, stream=self.batches.position(self.world.gather),
        )  # fmt: skip
        self.saving.save(reached, self._best_folder if self.curve else self.directory, model=model)
        self.saved = time.monotonic()
        self.spent = self.saved - started

    def _place(self) -> dict[str, float]:
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def _eager(self) -> AbstractContextManager[object]:
        """Batches of other shapes would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.saving.in_place()
