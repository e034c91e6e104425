"""Recall: can a model find again what it read? Every model learns a synthetic task of gam_lm.experiments.recall_tasks and is asked on fresh sequences.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from gam_lm.config import ModelConfig
from gam_lm.errors import DivergedError, InputError
from gam_lm.experiments.models import activations_per_token, build, described, state_bytes
from gam_lm.experiments.recall_tasks import RecallTask
from gam_lm.experiments.search import Range, points
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.results import Results
from gam_lm.runtime.progress import progress
from gam_lm.training.loop import make_optimizer, train_step
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

TEST_SEQUENCES, TUNING_SEQUENCES = 20_000, 30_000
"""Seeds of the sequences that models are tested on, and of those that decide between trials."""

TEST_BATCH = 128
TEST_TOKENS = 2**20
"""The most tokens that are drawn at once for a test."""
MODEL_TOKENS = 2**17
"""The most tokens that go through the model at once in a test, so that long sequences fit."""
MODEL_NUMBERS = 2**29
"""The most numbers that a layer may hold for them."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Trials of every model on every task, whose best recipe the seeds then have."""

    space: tuple[Range, ...]
    """What is tried."""
    trials: int
    """Of each model on each task, at the same points for all."""
    seed: int = 1000
    """Of the trials' initialisation and samples, and of the points."""


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
) -> None:
    """Train every model on every task and measure what is missing in ``results``; each finished row is written at once.

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
        search: tunes the recipe first. The best trial is the one with the most right answers on sequences of its own; every trial is a row.
    """
    for length in test_lengths:  # says what does not fit before anything is trained
        for task in tasks:
            try:
                replace(task, length=length)
            except InputError as error:
                raise InputError(f"test_lengths holds {length}: {error}") from None
    for task in tasks:
        runs = [_Run(name, _sized(config, task), task, recipe, results, device, test_sequences) for name, config in models]
        if search is not None:
            runs = [_tuned(run, search) for run in runs]
        with progress(f"recall of {task.pairs} pairs", len(seeds) * len(runs), "trainings") as bar:
            for seed in seeds:
                for run in runs:
                    bar.now(f"{run.name}, seed {seed}")
                    run.row(seed, test_lengths)
                    bar.advance()


def _sized(config: ModelConfig, task: RecallTask) -> ModelConfig:
    """A model for the task's ids and length."""
    return config.replace(vocab_size=task.vocab, max_position_embeddings=max(config.max_position_embeddings, task.length))


def _tuned(run: _Run, search: Search) -> _Run:
    """The run with the best of the recipes that are tried."""
    trials = []
    for index, values in enumerate(points(search.space, search.trials, search.seed)):
        own = replace(run, recipe=run.recipe.replace(**values), columns={"variant": f"trial{index}", "trial": index, "tuned": values})
        row = own.row(search.seed, (), test_seed=TUNING_SEQUENCES)
        if not row.get("diverged"):
            trials.append((row["accuracy"], -row["curve"][-1]["train_nats"], -index, values))
    if not trials:
        raise InputError(f"search found nothing for {run.name}: all {search.trials} trials diverged; try a lower learning rate")
    _, _, _, best = max(trials)
    logger.info("%s: the best of %d trials: %s", run.name, search.trials, ", ".join(f"{field} {value:g}" for field, value in best.items()))
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
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Of its rows, besides what says what was asked."""

    def row(self, seed: int, test_lengths: Sequence[int], *, test_seed: int = TEST_SEQUENCES) -> dict[str, Any]:
        """The row of a seed: that of the results, or a new one."""
        task, results = self.task, self.results
        own = self.recipe.replace(seed=seed, context=task.length)
        row: dict[str, Any] = {
            "model": self.name, "seed": seed, "task": task.task, "pairs": task.pairs, "sequence_length": task.length,
            "vocab": task.vocab, "gap_power": task.gap_power,
            **({} if task.filler == "random" else {"filler": task.filler}),  # rows that say nothing have random filler
            **described(self.config, self.device), "train_config": own.to_dict(), **self.columns,
        }  # fmt: skip
        label = f"{self.name} {task.task} P={task.pairs} T={task.length} {self.columns.get('variant', f'seed {seed}')}"
        there = results.find(row)
        parts = {part["length"]: part for part in (there or {}).get("by_length", ())}
        free = self.config.positions != "learned"
        wanted = parts.keys() | {length for length in test_lengths if free or length <= self.config.max_position_embeddings}
        if there is not None and (parts.keys() == wanted or there.get("diverged")):
            logger.info("%s: %s in %s", label, "diverged, already" if there.get("diverged") else "already", results.path)
            return there
        try:
            model, curve = _train(self.config, task, own, self.device, label)
        except DivergedError as error:
            logger.warning("%s: %s", label, error)
            row |= {"diverged": True, "divergence": error.figures()}
            results.add(row)
            return row
        measured = accuracy(model, task, sequences=self.test_sequences, seed=test_seed)
        state = state_bytes(self.config, task.length)
        logger.info("%s: accuracy %.4f, state %d bytes", label, measured["accuracy"], state)
        row |= {"parameters": model.count_parameters(), "state_bytes": state, **measured, "curve": curve}
        results.add(row | ({"by_length": list(parts.values())} if parts else {}))  # the longest test may be too long for this machine
        for length in sorted(wanted):
            parts[length] = {"length": length, **accuracy(model, replace(task, length=length), sequences=self.test_sequences, seed=test_seed)}
            results.add(row | {"by_length": [parts[each] for each in sorted(parts)]})
            logger.info("%s: accuracy %.4f at %d tokens", label, parts[length]["accuracy"], length)
        return row


def _train(
    config: ModelConfig, task: RecallTask, recipe: TrainConfig, device: torch.device, label: str
) -> tuple[LanguageModel, list[dict[str, float]]]:
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
            if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
                curve.append({"step": step + 1, "train_nats": float(loss)})
            bar.advance(1, f"loss {curve[-1]['train_nats']:.3f}" if curve else "")
    return model, curve


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
