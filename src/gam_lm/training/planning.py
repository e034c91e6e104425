"""From a prepared text to a plan: a few timed steps on this machine, and the rules of gam_lm.training.plan."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gam_lm.config import ModelConfig
from gam_lm.data.blocks import TrainingBlocks
from gam_lm.data.tokens import TokenCorpus
from gam_lm.diagnostics.cost import BYTES_PER_PARAMETER, model_cost
from gam_lm.model import count_parameters
from gam_lm.ops.number_formats import trains_faster_in_bf16
from gam_lm.runtime import processes
from gam_lm.runtime.isolation import available_mb
from gam_lm.runtime.measure import BYTES_PER_MB, step_times
from gam_lm.training.batches import Batches
from gam_lm.training.compiled import compile_for_training
from gam_lm.training.loop import new_model
from gam_lm.training.optimizers import make_optimizer
from gam_lm.training.plan import (
    CONTEXTS,
    DROPOUT,
    MOST_PASSES,
    SIZES,
    Schedule,
    Size,
    at,
    choose_size,
    context_for,
    recipe_for,
    rows_of_step,
    schedule,
    weight_decay_for,
)
from gam_lm.training.plan_words import Figures
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.step import train_step

logger = logging.getLogger("gam_lm")

SHARE_OF_TIMING = 0.01
"""Of the time, for the timed steps of one rung, and as much again for those before them, which are slower."""

WARMUP, TIMED = 8, 16
"""Steps that are not timed and that are, where this takes no more than their share of the time."""

SHARE_OF_MEMORY = 0.8
"""Of the free memory, for what a training step holds; the rest is for the libraries and the allocator's gaps."""

ENDLESS = 10**15
"""Tokens of a text that is streamed, for rules that ask how often it is read."""

SHORTEST = 60.0
"""Seconds: a run whose steps the user named is validated as one that takes at least so long."""


class Planned(NamedTuple):
    """What a run should be."""

    config: ModelConfig
    recipe: TrainConfig
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Looks for the model and recipe that suit a text, a time and a machine."""

    corpus: TokenCorpus
    """The text as token ids."""
    device: torch.device
    """Where it will be trained."""
    minutes: float
    """The time to fill."""
    config_at: Callable[[Size, float], ModelConfig]
    """The model of a rung with a dropout; what the user fixed is as fixed."""
    fixed: Mapping[str, Any]
    """Fields of TrainConfig that the user named."""
    fine_tuning: bool = False
    """Whether a trained model goes on."""
    tokens_per_step: int | None = None
    """Tokens that a step is to take: batch and accumulation follow. None leaves the batch to the rules."""
    endless: bool = False
    """Whether ``corpus`` is the head of a text that is longer than any run."""
    shard: bool = False
    """Whether weights, gradients and moments are spread over the processes."""
    sizes: Sequence[Size] = SIZES
    """The rungs to choose from."""
    most_passes: float = MOST_PASSES
    """The most passes over the text."""

    def plan(self) -> Planned:
        """Time some steps and decide."""
        seconds, tokens = 60 * self.minutes, ENDLESS if self.endless else self.corpus.splits["train"].tokens
        speeds: dict[Size, float] = {}

        def speed(size: Size) -> float:
            if size not in speeds:
                recipe = self._recipe(self.config_at(size, 0.1), 0)
                plain = recipe if recipe.compile == "off" else recipe.replace(compile="off")  # compiling each rung would take longer than it tells
                speeds[size] = recipe.batch_size * recipe.context / self.step_seconds(self.config_at(size, 0.1), plain)
                logger.debug("%d × %d: %.0f tokens/s", size.hidden_size, size.num_hidden_layers, speeds[size])
            return speeds[size]

        size = choose_size(tokens, seconds, speed, self.sizes)
        seen = min(seconds * speed(size), self.most_passes * tokens)
        recipe = self._recipe(self.config_at(size, 0.1), seen)
        step_seconds = self.step_seconds(self.config_at(size, 0.1), recipe)
        steps = self._steps(recipe)
        per_step = recipe.batch_size * recipe.context
        decided = schedule(
            seconds=seconds if steps is None else max(steps * step_seconds, SHORTEST), step_seconds=step_seconds, tokens_per_step=per_step, text_tokens=tokens,
            valid_tokens=self.corpus.splits["valid"].tokens, context=recipe.context, steps=steps, most_passes=self.most_passes,
        )  # fmt: skip
        passes = decided.steps * per_step / tokens
        chosen: dict[str, Any] = {"validate_every": decided.validate_every}
        if not self.fine_tuning:  # what a model has learned from another text is not to fade
            chosen["weight_decay"] = weight_decay_for(passes, tokens / per_step, recipe.learning_rate)
        recipe = recipe.replace(steps=decided.steps, **{name: value for name, value in chosen.items() if name not in self.fixed})
        config = self.config_at(size, at(DROPOUT, passes))
        return Planned(config, recipe, decided)

    def step_seconds(self, config: ModelConfig, recipe: TrainConfig) -> float:
        """Median seconds of a training step as the run would take it, of a model that is thrown away."""
        model = new_model(config, 0, self.device).train()
        batches = Batches(self.corpus, recipe)
        compile_for_training(model, recipe, 1)
        precision = ("bf16" if trains_faster_in_bf16(self.device) else "fp32") if recipe.precision == "auto" else recipe.precision  # the run itself logs why
        optimizer, dtype, batch = make_optimizer(model, recipe), choose_dtype(precision, self.device), batches.batch(0)
        times = step_times(
            lambda: train_step(model, optimizer, batch, recipe, recipe.learning_rate, dtype), self.device, warmup=WARMUP, iterations=TIMED,
            seconds=SHARE_OF_TIMING * 60 * self.minutes,
        )  # fmt: skip
        return statistics.median(times) / 1000

    def _recipe(self, config: ModelConfig, tokens_seen: float) -> TrainConfig:
        gpu = self.device.type == "cuda"
        recipe = recipe_for(hidden_size=config.hidden_size, tokens_seen=tokens_seen, gpu=gpu, minutes=self.minutes, fine_tuning=self.fine_tuning)
        batch_size = self.fixed.get("batch_size", recipe.batch_size)
        if self.tokens_per_step is not None:
            batch_size = max(1, self.tokens_per_step // CONTEXTS[0])
        train, valid = self.corpus.splits["train"], self.corpus.splits["valid"]
        context = min(longest_context(config), CONTEXTS[0] if train.marks is not None else context_for(train.tokens, valid.tokens, batch_size))
        context = self.fixed.get("context", context)
        if self.tokens_per_step is not None:
            fixed = {**self.fixed, "batch_size": rows_of_step(self.tokens_per_step, context)}
            asked = recipe.replace(**{**fixed, "context": context, "accumulate": 1, "steps": None})
            return asked.replace(accumulate=self.fixed.get("accumulate") or parts_that_fit(config, asked, self.device, self.shard))
        if "batch_size" not in self.fixed and "accumulate" not in self.fixed:
            blocks = TrainingBlocks(train.ids, context=context, batch_size=1, seed=0, overlap=self.fixed.get("blocks") != "paper", marks=train.marks)
            batch_size = min(batch_size, max(1, blocks.blocks_per_epoch // 2))
        return recipe.replace(**{"batch_size": batch_size, "context": context, **self.fixed, "steps": None})

    def _steps(self, recipe: TrainConfig) -> int | None:
        if self.fixed.get("steps") is not None:
            return int(self.fixed["steps"])
        return recipe.total_steps(Batches(self.corpus, recipe).steps_per_epoch) if "epochs" in self.fixed else None


def longest_context(config: ModelConfig) -> int:
    """Tokens of the longest sequence that a plan takes for a model."""
    return min(CONTEXTS[0], config.longest or CONTEXTS[0])


def parts_that_fit(config: ModelConfig, recipe: TrainConfig, device: torch.device, shard: bool = False) -> int:
    """The fewest parts of a batch whose activations, beside weights, gradients and moments, fit the memory that is free: ``TrainConfig.accumulate``.

    Counted with the cost model in fp32, which bf16 stays below; the processes of a machine share its memory, GPUs have their own.
    """
    count, cost = processes.world_size(), model_cost(config, recipe.context)
    held = BYTES_PER_PARAMETER * cost.total_parameters / (count if shard else 1)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_mb() * BYTES_PER_MB / processes.local_world_size()
    fits = max(1, int((SHARE_OF_MEMORY * free - held) // (cost.activation_bytes * recipe.context)))

    own = math.ceil(recipe.batch_size / count)
    divisors = [parts for parts in range(1, recipe.batch_size + 1) if recipe.batch_size % parts == 0]
    return next((parts for parts in divisors if math.ceil(own / math.ceil(parts / count)) <= fits), recipe.batch_size)


def figures_of(config: ModelConfig, recipe: TrainConfig, whole: TokenCorpus, device: torch.device) -> Figures:
    """What the lines of a plan tell besides the plan itself; ``whole`` has the whole validation split."""
    train = whole.splits["train"]
    mixers, layers = ", ".join(dict.fromkeys(config.mixers)), config.num_hidden_layers
    steps = recipe.total_steps(Batches(whole, recipe).steps_per_epoch)
    return Figures(
        documents=whole.source.left_out.few or sum(split.documents for split in whole.splits.values()), train_bytes=train.bytes,
        train_tokens=train.tokens, counted_tokens=train.tokens if train.marks is None else int(train.marks.counted.sum()),
        valid_tokens=whole.splits["valid"].tokens, entries=whole.vocab_size, left_out=whole.left_out,
        layers=f"{layers} {'layer' if layers == 1 else 'layers'} of {mixers}, {config.hidden_size} wide, dropout {config.dropout:g}",
        parameters=count_parameters(config), steps=steps, device=str(device),
    )  # fmt: skip


