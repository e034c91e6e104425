"""Recall: can a model find again what it read? Synthetic tasks whose answer stands in the context and nowhere else.

    mqar         keys bound to values, then the keys again, each at a gap drawn from a power law: what was its value?
                 (multi-query associative recall of Zoology, arXiv 2312.04927)
    forgetting   the same, but half of the keys are bound twice: the last value counts
    copying      tokens scattered over noise, then as many marks: the tokens in their order (selective copying of Mamba, arXiv 2312.00752)
    induction    a mark somewhere in random text, and again at the end: what followed it the first time? (arXiv 2212.14052)

Every batch is fresh. Filler never contains a key of the same sequence, so that no answer is ambiguous.

Shapes: B sequences, T tokens, P pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gam_lm.config import ModelConfig
from gam_lm.errors import DivergedError, InputError, unknown_name
from gam_lm.experiments.models import activations_per_token, build, described, state_bytes
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.results import Results
from gam_lm.runtime.progress import progress
from gam_lm.training.loop import make_optimizer, train_step
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

Sample = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Tokens, targets (IGNORE where nothing is asked) and the gap between each asked token and its answer, each int64 (B, T)."""

FILLERS = ("random", "blank")
"""See `RecallTask.filler`."""

TEST_BATCH = 128
TEST_TOKENS = 2**20
"""The most tokens that are drawn at once for a test."""
MODEL_TOKENS = 2**17
"""The most tokens that go through the model at once in a test, so that long sequences fit."""
MODEL_NUMBERS = 2**29
"""The most numbers that a layer may hold for them."""


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """Which task, at which size. Raises InputError for sizes that do not fit."""

    task: str = "mqar"
    """mqar, forgetting, copying or induction."""
    pairs: int = 8
    """Pairs of key and value (copying: tokens; induction: 1)."""
    length: int = 64
    """Tokens of a sequence."""
    vocab: int = 512
    """Token ids: the lower half keys, the upper half values."""
    gap_power: float = 0.01
    """Exponent of the power law that the gaps are drawn from: near 0 most are short (Zoology's setting), 1 is uniform."""
    filler: str = "random"
    """What stands between the pairs and the questions of mqar and forgetting: random, ids that look like pairs; or blank, one id that is never a key."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        if self.pairs < 1 or self.vocab < 8 or not 0 < self.gap_power <= 1:
            raise InputError(f"pairs is {self.pairs}, vocab {self.vocab}, gap_power {self.gap_power}: use at least 1, at least 8, and above 0 up to 1")
        if self.filler not in FILLERS:
            raise unknown_name("filler", self.filler, FILLERS)
        bindings = self.pairs + (self.pairs // 2 if self.task == "forgetting" else 0)
        needed = {"copying": 2 * self.pairs, "induction": 4}.get(self.task, 2 * (bindings + self.pairs))
        if self.length < needed:
            raise InputError(f"length is {self.length}: {self.task} with {self.pairs} pairs takes at least {needed} tokens")
        if self.task in ("mqar", "forgetting") and self.vocab // 2 <= self.pairs:
            raise InputError(f"vocab is {self.vocab}: {self.pairs} pairs and a filler take more than {2 * self.pairs} token ids")

    def sample(self, batch: int, generator: np.random.Generator) -> Sample:
        """A fresh batch."""
        return TASKS[self.task](self, batch, generator)


def _bindings(task: RecallTask, batch: int, generator: np.random.Generator, repeated: int) -> Sample:
    """Pairs at the start, the first ``repeated`` keys bound twice; then each key once more among filler."""
    B, P, T, half = batch, task.pairs, task.length, task.vocab // 2
    blank = int(task.filler == "blank")  # its id, 0, is then no key
    order = blank + generator.random((B, half - blank)).argsort(1)  # a permutation of the keys: the first P are bound, the others may be filler
    keys_BP, unused = order[:, :P], order[:, P:]
    bound = np.concatenate([keys_BP, keys_BP[:, :repeated]], 1)
    bound = np.take_along_axis(bound, generator.random(bound.shape).argsort(1), 1)
    values = generator.integers(half, task.vocab, bound.shape)
    start = 2 * bound.shape[1]

    if blank:
        tokens = np.zeros((B, T), np.int64)
    else:
        filler = generator.integers(0, task.vocab - P, (B, T))  # every id but the keys of this sequence
        tokens = np.where(filler < half - P, np.take_along_axis(unused, np.minimum(filler, half - P - 1), 1), filler + P)
    tokens[:, 0:start:2], tokens[:, 1:start:2] = bound, values

    slots = (T - start) // 2
    weight = task.gap_power * np.arange(1, slots + 1, dtype=np.float64) ** (task.gap_power - 1)
    race = generator.exponential(size=(B, slots)) / weight  # the P smallest are a draw without replacement by weight
    places = start + 2 * race.argsort(1)[:, :P]
    places = np.take_along_axis(places, generator.random((B, P)).argsort(1), 1)
    rows = np.arange(B)[:, None]
    tokens[rows, places] = keys_BP

    same = bound[:, None] == keys_BP[..., None]  # (B, P, bindings)
    last = same.shape[2] - 1 - same[..., ::-1].argmax(2)
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[rows, places] = np.take_along_axis(values, last, 1)
    gaps[rows, places] = places - 2 * last
    return tokens, targets, gaps


def _mqar(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    return _bindings(task, batch, generator, 0)


def _forgetting(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    return _bindings(task, batch, generator, task.pairs // 2)


def _copying(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    """0 is noise, 1 the mark; the tokens to copy are the others."""
    B, P, T = batch, task.pairs, task.length
    tokens = np.zeros((B, T), np.int64)
    places = np.sort(generator.random((B, T - P)).argsort(1)[:, :P], 1)
    wanted = generator.integers(2, task.vocab, (B, P))
    np.put_along_axis(tokens, places, wanted, 1)
    tokens[:, T - P :] = 1
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[:, T - P :] = wanted
    gaps[:, T - P :] = np.arange(T - P, T) - places
    return tokens, targets, gaps


def _induction(task: RecallTask, batch: int, generator: np.random.Generator) -> Sample:
    """0 is the mark, which stands once in the text and at its end."""
    B, T = batch, task.length
    tokens = generator.integers(1, task.vocab, (B, T))
    place = generator.integers(0, T - 2, B)
    rows = np.arange(B)
    tokens[rows, place] = 0
    tokens[:, -1] = 0
    targets, gaps = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    targets[:, -1] = tokens[rows, place + 1]
    gaps[:, -1] = T - 1 - place
    return tokens, targets, gaps


TASKS: dict[str, Callable[[RecallTask, int, np.random.Generator], Sample]] = {
    "mqar": _mqar, "forgetting": _forgetting, "copying": _copying, "induction": _induction,
}  # fmt: skip


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
    """
    for length in test_lengths:  # says what does not fit before anything is trained
        for task in tasks:
            try:
                replace(task, length=length)
            except InputError as error:
                raise InputError(f"test_lengths holds {length}: {error}") from None
    for task in tasks:
        for seed in seeds:
            for name, config in models:
                sized = config.replace(vocab_size=task.vocab, max_position_embeddings=max(config.max_position_embeddings, task.length))
                own = recipe.replace(seed=seed, context=task.length)
                row: dict[str, Any] = {
                    "model": name, "seed": seed, "task": task.task, "pairs": task.pairs, "sequence_length": task.length,
                    "vocab": task.vocab, "gap_power": task.gap_power,
                    **({} if task.filler == "random" else {"filler": task.filler}),  # rows that say nothing have random filler
                    **described(sized), "train_config": own.to_dict(),
                }  # fmt: skip
                label = f"{name} {task.task} P={task.pairs} T={task.length} seed {seed}"
                there = results.find(row)
                parts = {part["length"]: part for part in (there or {}).get("by_length", ())}
                wanted = parts.keys() | {length for length in test_lengths if sized.positions != "learned" or length <= sized.max_position_embeddings}
                if there is not None and parts.keys() == wanted:
                    logger.info("%s: already in %s", label, results.path)
                    continue
                if there is not None and there.get("diverged"):
                    logger.info("%s: diverged, already in %s", label, results.path)
                    continue
                try:
                    model, curve = _train(sized, task, own, device, label)
                except DivergedError as error:
                    logger.warning("%s: %s", label, error)
                    results.add(row | {"diverged": True, "divergence": error.figures()})
                    continue
                measured = accuracy(model, task, sequences=test_sequences)
                state = state_bytes(sized, task.length)
                logger.info("%s: accuracy %.4f, state %d bytes", label, measured["accuracy"], state)
                row |= {"parameters": model.count_parameters(), "state_bytes": state, **measured, "curve": curve}
                results.add(row | ({"by_length": list(parts.values())} if parts else {}))  # the longest test may be too long for this machine
                for length in sorted(wanted):
                    parts[length] = {"length": length, **accuracy(model, replace(task, length=length), sequences=test_sequences)}
                    results.add(row | {"by_length": [parts[each] for each in sorted(parts)]})
                    logger.info("%s: accuracy %.4f at %d tokens", label, parts[length]["accuracy"], length)


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
def accuracy(model: LanguageModel, task: RecallTask, *, sequences: int = 1024, seed: int = 20_000) -> dict[str, Any]:
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
