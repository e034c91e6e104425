"""The plan of `gam train` in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gam_lm.training.plan import MOST_PASSES, MUON_LEARNING_RATE, Plan
from gam_lm.training.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the lines of a plan tell besides."""

    documents: int
    train_bytes: int
    """Of conversations, what the assistant said."""
    train_tokens: int
    counted_tokens: int
    """Those of the training tokens that are predicted: in conversations the assistant's."""
    valid_tokens: int
    """Of the whole split."""
    entries: int
    """Entries that the tokenizer has."""
    left_out: tuple[str, ...]
    layers: str
    """What the layers are, in words."""
    parameters: int
    steps: int
    """Optimiser steps of the whole run."""
    device: str


def explain(plan: Plan, recipe: TrainConfig, figures: Figures) -> Iterator[str]:
    """The plan in five lines."""
    f = figures
    left_out = "left out: " + "; ".join(f.left_out) if f.left_out else "nothing left out"
    left_out += "; rows without text are skipped as they come" if plan.lanes else ""
    measured = f"{plan.valid_tokens:,} of {f.valid_tokens:,}" if plan.valid_tokens < f.valid_tokens else f"{f.valid_tokens:,}"
    documents = f"{f.documents:,} {'conversation' if plan.chat else 'document'}{'' if f.documents == 1 else 's'}"
    size = f"{f.counted_tokens:,} tokens of answers" if plan.chat else f"{_size(f.train_bytes)} and {f.train_tokens:,} tokens"
    text = f"streamed in {plan.lanes} lanes; the plan rests on its first {documents}," if plan.lanes else f"{documents},"
    yield f"text        {text} {size} to train on, {measured} tokens to validate on; {left_out}"
    length = "" if plan.chat else f", {f.train_bytes / f.train_tokens:.2f} bytes a token"
    yield f"vocabulary  {f.entries:,} entries{length}" + (f", of {plan.start}" if plan.start else "")
    yield f"model       {plan.model}: {f.layers}, {f.parameters:,} parameters" + (f", starting from {plan.start}" if plan.start else "")
    per_step = recipe.batch_size * recipe.context
    rates = f"Muon {recipe.muon_learning_rate or MUON_LEARNING_RATE:.3g}, AdamW" if recipe.optimizer == "muon" else "AdamW"
    seen = f"{f.steps * per_step:,} tokens of the stream" if plan.lanes else f"{f.steps * per_step / f.train_tokens:.2g} passes over the text"
    passes = f.steps * per_step / f.train_tokens
    yield (
        f"training    {f.steps:,} steps of {recipe.batch_size} × {recipe.context} tokens, {seen}, {rates} {recipe.learning_rate:.3g}"
        + (f", weight decay {recipe.weight_decay:.2g}" if recipe.weight_decay != TrainConfig().weight_decay else "")
    )
    early = plan.minutes and plan.seconds < 0.8 * 60 * plan.minutes and passes > 0.9 * MOST_PASSES
    why = f"; the text is too small to use all of the {plan.minutes:g} that it may take" if early else ""
    yield f"time        about {duration(plan.seconds)} on {f.device}{why}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def batch_line(recipe: TrainConfig, processes: int, tokens_per_step: int | None = None) -> str:
    """What a step consists of, as a line of the plan; ``tokens_per_step`` is what was asked for."""
    tokens, rows, parts = recipe.batch_size * recipe.context, -(-recipe.batch_size // processes), -(-recipe.accumulate // processes)
    asked = f" ({tokens_per_step:,} asked for)" if tokens_per_step not in (None, tokens) else ""
    spread = f" on {processes} processes" if processes > 1 else ""
    each = f"{-(-rows // min(rows, parts))} at a time{' on each' if processes > 1 else ''}, accumulation {min(rows, parts)}"
    return f"batch       {tokens:,} tokens a step{asked}: {recipe.batch_size} sequences of {recipe.context}{spread}, {each}"
