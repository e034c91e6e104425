"""Recall: can a model find again what it read? Every model learns a synthetic task of gam_lm.experiments.recall_tasks and is asked on fresh sequences.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from gam_lm.config import ModelConfig
from gam_lm.errors import DivergedError, InputError
from gam_lm.experiments.models import build, described, state_bytes
from gam_lm.experiments.recall_accuracy import TEST_SEQUENCES, TUNING_SEQUENCES, accuracy
from gam_lm.experiments.recall_tasks import RecallTask
from gam_lm.experiments.search import Search, points
from gam_lm.model import LanguageModel
from gam_lm.report.recall_rows import STOP_EVERY, order_of_trials
from gam_lm.results import Results, identity
from gam_lm.runtime.progress import progress
from gam_lm.runtime.workers import claimed
from gam_lm.training.loop import make_optimizer, train_step
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

Known = Mapping[str, dict[str, Any]]
"""The rows of the results by their identity."""

STOP_SEQUENCES = 256
"""Those on which a training looks whether it has learned its task."""


def recall(
    models: Sequence[tuple[str, ModelConfig]],
    tasks: Sequence[RecallTask],
    seeds: Sequence[int],
    recipe: TrainConfig,
    results: Results,
    device: torch.device,
    *,
    test_sequences: int = 1024,
    test_lengths: Sequence[int] = (),
    search: Search | None = None,
    stop_at: float | None = None,
) -> None:
    """Train every model on every task and measure what is missing in ``results``; each finished row is written at once.

    Processes that share the results file share the rows, and each returns when all are there.

    Args:
        models: row names and configurations; ``vocab_size`` is that of the task.
        tasks: sizes to try.
        seeds: of initialisation and samples; test samples are the same for all models.
        recipe: steps, batch size and learning rate; ``context`` is the task's.
        results: an open results.json.
        device: where to train.
        test_sequences: how many fresh sequences the accuracy is measured on.
        test_lengths: further lengths to measure it at, without training there: does what was learned hold over greater distances? A model of
            learned positions is measured up to the last of them. A row that lacks a length is trained again, with the same seed.
        search: tunes the recipe first. The best trial is the one with the most right answers on sequences of its own, and of those that stopped early the
            one that took the fewest steps; every trial is a row.
        stop_at: share of right answers, on sequences of their own, at which trainings stop, as Zoology's do; looked at every `STOP_EVERY` steps. None: never.
    """
    for length, task in product(test_lengths, tasks):  # says what does not fit before anything is trained
        try:
            replace(task, length=length)
        except InputError as error:
            raise InputError(f"test_lengths holds {length}: {error}") from None
    runs = [[_Run(name, _sized(config, task), task, recipe, results, device, test_sequences, stop_at) for name, config in models] for task in tasks]
    total = sum(len(of_task) for of_task in runs) * (len(seeds) + (search.trials if search else 0))

    def look() -> tuple[int, list[_Training]]:
        """How many trainings are done, and those that are missing and wait for nothing."""
        known = _known(results)
        trainings = [each for of_task in runs for each in _next(of_task, seeds, test_lengths, search, known)]
        left = [each for each in trainings if not each.done(known)]
        return len(trainings) - len(left), left

    done, missing = look()
    with progress("recall", total, "trainings", done=done) as bar:
        while missing:
            for each in missing:
                with claimed(results.path.parent, each.label) as ours:
                    if ours and not each.done(known := _known(results)):  # another process may have ended it since
                        bar.now(each.label)
                        each.train(known)
                        break
            else:
                time.sleep(1)  # others train what is left
            done, missing = look()
            bar.advance(done - bar.done)


def _known(results: Results) -> Known:
    """The rows, with those that other processes have added."""
    results.reread()
    return {identity(row): row for row in results.rows}


def _sized(config: ModelConfig, task: RecallTask) -> ModelConfig:
    """A model for the task's ids and length."""
    return config.replace(vocab_size=task.vocab, max_position_embeddings=max(config.max_position_embeddings, task.length))


def _next(runs: Sequence[_Run], seeds: Sequence[int], test_lengths: Sequence[int], search: Search | None, known: Known) -> Iterator[_Training]:
    """The trainings of a task: a model's trials, and where all of them are done, those of its seeds with the best one's recipe."""
    tuned = []
    for run in runs:
        trials = run.trials(search) if search else []
        if all(each.done(known) for each in trials):
            tuned.append(_best(run, trials, known) if trials else run)
        yield from trials
    for seed in seeds:
        for run in tuned:
            yield _Training(run, seed, tuple(test_lengths))


def _best(run: _Run, trials: Sequence[_Training], known: Known) -> _Run:
    """The run with the best of the recipes that were tried."""
    rows = [row for each in trials if (row := each.row(known)) is not None and not row.get("diverged")]
    if not rows:
        raise InputError(f"search found nothing for {run.name}: all {len(trials)} trials diverged; try a lower learning rate")
    best = min(rows, key=order_of_trials)["tuned"]
    return replace(run, recipe=run.recipe.replace(**best), columns={"tuned": best})


@dataclass(frozen=True)
class _Run:
    """A model on a task."""

    name: str
    config: ModelConfig
    task: RecallTask
    recipe: TrainConfig
    results: Results
    device: torch.device
    test_sequences: int
    stop_at: float | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Of its rows, besides what says what was asked."""

    def trials(self, search: Search) -> list[_Training]:
        """With each of the recipes that are tried."""
        return [
            _Training(replace(self, recipe=self.recipe.replace(**values), columns={"variant": f"trial{i}", "trial": i, "tuned": values}), search.seed, (), TUNING_SEQUENCES)
            for i, values in enumerate(points(search.space, search.trials, search.seed))
        ]


@dataclass(frozen=True)
class _Training:
    """A run with a seed: a row of the results."""

    run: _Run
    seed: int
    test_lengths: tuple[int, ...]
    test_seed: int = TEST_SEQUENCES

    @property
    def label(self) -> str:
        """In words; also the name of the claim."""
        run, task = self.run, self.run.task
        return f"{run.name.replace(':', '-')} {task.task} P={task.pairs} T={task.length} {run.columns.get('variant', f'seed {self.seed}')}"

    @property
    def recipe(self) -> TrainConfig:
        """The run's, with the seed."""
        return self.run.recipe.replace(seed=self.seed, context=self.run.task.length)

    def asked(self) -> dict[str, Any]:
        """What the row says of what was asked."""
        run, task = self.run, self.run.task
        return {
            "model": run.name, "seed": self.seed, "task": task.task, "pairs": task.pairs, "sequence_length": task.length,
            "vocab": task.vocab, "gap_power": task.gap_power,
            **({} if task.filler == "random" else {"filler": task.filler}),  # rows that say nothing have random filler
            **({} if run.stop_at is None else {"stop_at": run.stop_at}),
            **described(run.config, run.device), "train_config": self.recipe.to_dict(), **run.columns,
        }  # fmt: skip

    def row(self, known: Known) -> dict[str, Any] | None:
        """What the results have of it."""
        return known.get(identity(self.asked()))

    def done(self, known: Known) -> bool:
        """Whether its row has all lengths that are asked for."""
        row = self.row(known)
        return row is not None and (bool(row.get("diverged")) or self._lengths(row) == {part["length"] for part in row.get("by_length", ())})

    def _lengths(self, row: Mapping[str, Any]) -> set[int]:
        """Those to measure: what a row has, and what is asked for as far as the model has positions for it."""
        config = self.run.config
        asked = {length for length in self.test_lengths if config.positions != "learned" or length <= config.max_position_embeddings}
        return asked | {part["length"] for part in row.get("by_length", ())}

    def train(self, known: Known) -> None:
        """Train and measure it, and write its row."""
        run, task, results = self.run, self.run.task, self.run.results
        row, parts = self.asked(), {part["length"]: part for part in (self.row(known) or {}).get("by_length", ())}
        wanted = self._lengths({"by_length": list(parts.values())})
        if "tuned" in row and "trial" not in row:
            logger.info("%s: the best of its trials has %s", self.label, ", ".join(f"{field} {value:g}" for field, value in row["tuned"].items()))
        try:
            model, figures = _train(run.config, task, self.recipe, run.device, self.label, run.stop_at)
        except DivergedError as error:
            logger.warning("%s: %s", self.label, error)
            results.add(row | {"diverged": True, "divergence": error.figures()})
            return
        measured = accuracy(model, task, sequences=run.test_sequences, seed=self.test_seed)
        row |= {"parameters": model.count_parameters(), "state_bytes": state_bytes(run.config, task.length), **measured, **figures}
        logger.info("%s: accuracy %.4f, state %d bytes", self.label, row["accuracy"], row["state_bytes"])
        results.add(row | ({"by_length": list(parts.values())} if parts else {}))  # the longest test may be too long for this machine
        for length in sorted(wanted):
            longer = accuracy(model, replace(task, length=length), sequences=run.test_sequences, seed=self.test_seed)
            parts[length] = {"length": length, **longer}
            results.add(row | {"by_length": [parts[each] for each in sorted(parts)]})
            logger.info("%s: accuracy %.4f at %d tokens", self.label, longer["accuracy"], length)


def _train(
    config: ModelConfig, task: RecallTask, recipe: TrainConfig, device: torch.device, label: str, stop_at: float | None
) -> tuple[LanguageModel, dict[str, Any]]:
    """The trained model, its loss curve, and the step at which it had learned the task where it stops there."""
    if recipe.steps is None:
        raise InputError("steps is not given: every batch of recall is fresh, there are no epochs")
    model = build(config, recipe.seed, device)
    optimizer, dtype = make_optimizer(model, recipe), choose_dtype(recipe.precision, device)
    generator = np.random.default_rng([recipe.seed, 1])
    curve: list[dict[str, float]] = []
    model.train()
    with progress(label, recipe.steps, "steps") as bar:
        for step in range(recipe.steps):
            tokens, targets, _ = task.sample(recipe.batch_size, generator)
            try:
                loss, _, _ = train_step(model, optimizer, (tokens, targets), recipe, recipe.rate(step, recipe.steps), dtype)
            except DivergedError as error:
                raise error.at(step) from None
            done = step + 1
            if done % 50 == 0 or done == recipe.steps:
                curve.append({"step": done, "train_nats": float(loss)})
            bar.advance(1, f"loss {curve[-1]['train_nats']:.3f}" if curve else "")
            if stop_at is not None and done % STOP_EVERY == 0 and _share_right(model, task) >= stop_at:
                return model, {"curve": curve, "learned_at": done}
    return model, {"curve": curve}


def _share_right(model: LanguageModel, task: RecallTask) -> float:
    """What a training that may stop early looks at."""
    return float(accuracy(model, task, sequences=STOP_SEQUENCES, seed=TUNING_SEQUENCES)["accuracy"])
