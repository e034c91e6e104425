"""Recall: can a model find again what it read? Every model learns a synthetic task of gam_lm.experiments.recall_tasks and is asked on fresh sequences.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from gam_lm.config import ModelConfig
from gam_lm.errors import DivergedError, InputError
from gam_lm.experiments.models import activations_per_token, build, described, state_bytes
from gam_lm.experiments.recall_tasks import RecallTask
from gam_lm.experiments.search import Search, points
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.report.recall_rows import STOP_EVERY, order_of_trials
from gam_lm.results import Results
from gam_lm.runtime.progress import progress
from gam_lm.runtime.workers import claimed
from gam_lm.training.loop import make_optimizer, train_step
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

TEST_SEQUENCES, TUNING_SEQUENCES = 20_000, 30_000
"""Seeds of the sequences that models are tested on, and of those that decide between trials."""

STOP_SEQUENCES = 256
"""Those on which a training looks whether it has learned its task."""
TEST_BATCH = 128
TEST_TOKENS = 2**20
"""The most tokens that are drawn at once for a test."""
MODEL_TOKENS = 2**17
"""The most tokens that go through the model at once in a test, so that long sequences fit."""
MODEL_NUMBERS = 2**29
"""The most numbers that a layer may hold for them."""


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
    with progress("recall", total, "trainings") as bar:
        while True:
            results.reread()
            missing = [each for of_task in runs for each in _next(of_task, seeds, test_lengths, search) if not each.done()]
            for each in missing:
                with claimed(results.path.parent, each.label) as ours:
                    if ours:
                        bar.now(each.label)
                        each.train()
                        bar.advance()
                        break
            else:
                if not missing:
                    return
                time.sleep(1)  # others train what is left


def _sized(config: ModelConfig, task: RecallTask) -> ModelConfig:
    """A model for the task's ids and length."""
    return config.replace(vocab_size=task.vocab, max_position_embeddings=max(config.max_position_embeddings, task.length))


def _next(runs: Sequence[_Run], seeds: Sequence[int], test_lengths: Sequence[int], search: Search | None) -> Iterator[_Training]:
    """The trainings of a task: a model's trials, and where all of them are done, those of its seeds with the best one's recipe."""
    tuned = []
    for run in runs:
        trials = run.trials(search) if search else []
        if all(each.done() for each in trials):
            tuned.append(_best(run, trials) if trials else run)
        yield from trials
    for seed in seeds:
        for run in tuned:
            yield _Training(run, seed, tuple(test_lengths))


def _best(run: _Run, trials: Sequence[_Training]) -> _Run:
    """The run with the best of the recipes that were tried."""
    rows = [row for each in trials if (row := each.row()) is not None and not row.get("diverged")]
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

    def row(self) -> dict[str, Any] | None:
        """What the results have of it."""
        return self.run.results.find(self.asked())

    def done(self) -> bool:
        """Whether its row has all lengths that are asked for."""
        row = self.row()
        return row is not None and (bool(row.get("diverged")) or self._lengths(row) == {part["length"] for part in row.get("by_length", ())})

    def _lengths(self, row: Mapping[str, Any]) -> set[int]:
        """Those to measure: what a row has, and what is asked for as far as the model has positions for it."""
        config = self.run.config
        asked = {length for length in self.test_lengths if config.positions != "learned" or length <= config.max_position_embeddings}
        return asked | {part["length"] for part in row.get("by_length", ())}

    def train(self) -> None:
        """Train and measure it, and write its row."""
        run, task, results = self.run, self.run.task, self.run.results
        row, parts = self.asked(), {part["length"]: part for part in (self.row() or {}).get("by_length", ())}
        wanted = self._lengths({"by_length": list(parts.values())})
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


@torch.no_grad()
def accuracy(model: LanguageModel, task: RecallTask, *, sequences: int = 1024, seed: int = TEST_SEQUENCES) -> dict[str, Any]:
    """Share of right answers on fresh sequences, in all and by gap.

    Args:
        model: its training mode is restored afterwards.
        task: what is asked.
        sequences: how many.
        seed: of the sequences.

    Returns:
        ``accuracy``, and ``by_gap``: answers and accuracy for gaps in [2^k, 2^(k+1)).
    """
    device = model.embed_tokens.weight.device
    was_training = model.training
    model.eval()
    generator = np.random.default_rng([seed, 2])
    right, gaps = [], []
    held = max(1.0, activations_per_token(model.config, task.length))
    batch = min(TEST_BATCH, max(1, TEST_TOKENS // task.length))
    for start in range(0, sequences, batch):
        tokens, targets, gap = task.sample(min(batch, sequences - start), generator)
        asked = targets != IGNORE
        few = max(1, int(min(MODEL_TOKENS, MODEL_NUMBERS / held)) // task.length)
        for i in range(0, len(tokens), few):
            hidden_BTD, _ = model.hidden(torch.from_numpy(tokens[i : i + few]).to(device))
            answers_N = model.lm_head(hidden_BTD[torch.from_numpy(asked[i : i + few]).to(device)]).argmax(-1).cpu().numpy()
            right.append(answers_N == targets[i : i + few][asked[i : i + few]])
        gaps.append(gap[asked])
    model.train(was_training)
    right_N, gap_N = np.concatenate(right), np.concatenate(gaps)
    by_gap = []
    for k in range(int(math.log2(gap_N.max())) + 1):
        within = (gap_N >= 2**k) & (gap_N < 2 ** (k + 1))
        if within.any():
            by_gap.append({"gap_from": 2**k, "answers": int(within.sum()), "accuracy": float(right_N[within].mean())})
    return {"accuracy": float(right_N.mean()), "answers": len(right_N), "by_gap": by_gap}
