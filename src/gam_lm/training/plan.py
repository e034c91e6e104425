"""The rules of `gam train`: what model and recipe suit a text, a time and a machine. Imports no torch.

Everything that a measurement may change is a table or a number at the top of this file. `gam bench-plan` measures the ladder that they come from.
A table's first column says from which amount on a line holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from gam_lm.errors import InputError, check_object, checked
from gam_lm.training.recipe import TrainConfig

T = TypeVar("T")

MINUTES = 10.0
"""Where no time is given."""


class Size(NamedTuple):
    """A rung of the ladder of models, and what it takes to be worth more than the rung below."""

    hidden_size: int
    num_hidden_layers: int
    tokens_seen: float
    """Tokens that the model has to see in training, repetitions included."""
    text_tokens: float
    """Tokens that the text has to have."""


SIZES = (
    Size(64, 3, 0, 0),
    Size(128, 4, 4e5, 3e4),
    Size(192, 6, 5e6, 1e6),
    Size(256, 6, 2e7, 3e6),
    Size(384, 8, 8e7, 1e7),
    Size(512, 10, 2e8, 4e7),
    Size(768, 12, 1e9, 2e8),
)

VOCABULARY = ((0, 512), (1e5, 1024), (6e5, 2048), (1e7, 4096), (5e7, 8192), (4e8, 16_384))
"""Bytes of text → entries of the tokenizer."""

READ_OFTEN, READ_OFTEN_BYTES, READ_OFTEN_VOCABULARY = 8.0, 2e6, 1024
"""With so many minutes for each million bytes, a text below so many bytes has at most so many entries: one that is read often wants shorter tokens."""

BATCH = ((0, 4), (1e7, 8), (4e7, 16), (2e8, 32), (1e9, 64))
"""Tokens seen → sequences in a batch, on a CPU."""

GPU_BATCH = 4
"""Times as many on a GPU, which small batches leave idle."""

CONTEXTS = (256, 128, 64, 32, 16)
"""Tokens in a sequence: the longest of these that leaves a text enough sequences."""

DROPOUT = ((0, 0.0), (3, 0.1), (5, 0.15), (7, 0.2), (10, 0.3))
"""Passes over the text → dropout."""

MOST_PASSES = 12
"""Beyond these a model only learns the text by heart: the run ends earlier than it may."""

REPEATED = 2
"""Passes from which on weight decay follows from the text."""

WEIGHT_DECAY_PASSES, MOST_WEIGHT_DECAY = 1.0, 1.5
"""In so many passes at the highest learning rate a weight that no gradient renews falls to 1/e (Wang & Aitchison, arXiv 2405.13698). The largest decay."""

LEARNING_RATE, AT_WIDTH, POWER = 1.2e-2, 128, 0.5
"""AdamW's, of embeddings and vectors, falls with this power of the width from this width on. Muon's is the same at every width."""

MUON_LEARNING_RATE = 0.03

CLIP = 0.1
"""Largest norm of the gradient."""

FINE_TUNING = 0.25
"""Share of the learning rates that a trained model goes on with."""

SHARE_OF_VALIDATION = 0.03
"""Largest share of the time that a single validation may take; of a longer split its first part is measured."""

SHARE_OF_VALIDATIONS = 0.10
"""Of all validations within the run."""

MOST_VALIDATIONS = 10

SHARE_OF_REST = 0.03
"""Of everything else: saving, the timed steps, the sample."""

FORWARD_SHARE = 0.4
"""Time of a validated token, in times of a trained one."""

COMPILE_FROM = 30.0
"""Minutes from which on compiling the blocks pays for the time it takes: some 40 seconds on two idle cores, minutes on busy ones."""


def at(table: Sequence[tuple[float, T]], amount: float) -> T:
    """The value of the last line of a table that starts at or below ``amount``."""
    return [value for start, value in table if start <= amount or start == table[0][0]][-1]


def vocabulary_for(text_bytes: int, minutes: float) -> int:
    """Entries of the tokenizer for a training text of so many bytes and a run of so many minutes."""
    entries = at(VOCABULARY, text_bytes)
    often = text_bytes < READ_OFTEN_BYTES and minutes * 1e6 >= READ_OFTEN * text_bytes
    return min(entries, READ_OFTEN_VOCABULARY) if often else entries


def context_for(train_tokens: int, valid_tokens: int, batch_size: int) -> int:
    """Tokens in a sequence: the longest that leaves some ten batches to train on and two sequences to validate on."""
    fits = (each for each in CONTEXTS if train_tokens > 10 * batch_size * each and valid_tokens > 2 * each)
    return next(fits, CONTEXTS[-1])


def learning_rate_for(hidden_size: int) -> float:
    """AdamW's learning rate at a width."""
    return LEARNING_RATE * min(1.0, (AT_WIDTH / hidden_size) ** POWER)


def choose_size(text_tokens: int, seconds: float, speed: Callable[[Size], float], sizes: Sequence[Size] = SIZES) -> Size:
    """The largest rung that the text and the time suffice for.

    Args:
        text_tokens: of the training split.
        seconds: of training.
        speed: measures tokens per second of a rung; called from the smallest rung up, and no further than one that is too slow.
        sizes: the ladder.
    """
    chosen = sizes[0]
    for size in sizes[1:]:
        if text_tokens < size.text_tokens or seconds * speed(size) < size.tokens_seen:
            break
        chosen = size
    return chosen


def weight_decay_for(passes: float, steps_per_pass: float, learning_rate: float) -> float:
    """λ of a run that reads its text so often: what keeps it from being learned by heart."""
    usual = TrainConfig().weight_decay
    return usual if passes < REPEATED else float(f"{min(MOST_WEIGHT_DECAY, max(usual, 1 / (learning_rate * steps_per_pass * WEIGHT_DECAY_PASSES))):.2g}")


def rows_of_step(tokens_per_step: int, context: int) -> int:
    """Whole sequences of a step that is to take so many tokens. Raises InputError where not even one fits."""
    if tokens_per_step < context:
        raise InputError(f"tokens_per_step is {tokens_per_step} for sequences of {context} tokens: use at least {context}, or a shorter --context")
    return tokens_per_step // context


class Schedule(NamedTuple):
    """How long a run is and how it is validated."""

    steps: int
    validate_every: int | None
    valid_tokens: int
    """Of the validation split, from its start, that every validation measures."""
    seconds: float
    """What it should take, validation included."""


def schedule(
    *, seconds: float, step_seconds: float, tokens_per_step: int, text_tokens: int, valid_tokens: int, context: int, steps: int | None = None,
    most_passes: float = MOST_PASSES,
) -> Schedule:  # fmt: skip
    """Divide a time between training and validation.

    Args:
        seconds: the time to fill.
        step_seconds: of an optimiser step.
        tokens_per_step: of a batch.
        text_tokens: of the training split.
        valid_tokens: of the validation split.
        context: tokens of a sequence; no less than a few of them are validated.
        steps: where the user named their number, whatever it takes.
        most_passes: over the text.
    """
    per_token = FORWARD_SHARE * step_seconds / tokens_per_step
    measured = min(valid_tokens, max(4 * context + 1, int(SHARE_OF_VALIDATION * seconds / per_token)))
    one = measured * per_token
    inner = max(0, min(MOST_VALIDATIONS, int(SHARE_OF_VALIDATIONS * seconds / one)) - 1)
    if steps is None:
        left = seconds * (1 - SHARE_OF_REST) - (inner + 1) * one
        steps = max(1, min(int(left / step_seconds), int(min(most_passes * text_tokens, 1e18) / tokens_per_step)))
    every = max(1, -(-steps // (inner + 1))) if inner else None
    validations = 1 if every is None else -(-steps // every)
    return Schedule(steps, every, measured, (steps * step_seconds + validations * one) / (1 - SHARE_OF_REST))


def recipe_for(*, hidden_size: int, tokens_seen: float, gpu: bool = False, minutes: float = MINUTES, fine_tuning: bool = False) -> TrainConfig:
    """The recipe of a width and of a number of tokens; steps, context and validations follow from `schedule`."""
    share = FINE_TUNING if fine_tuning else 1.0
    return TrainConfig(
        batch_size=at(BATCH, tokens_seen) * (GPU_BATCH if gpu else 1), optimizer="muon", learning_rate=share * learning_rate_for(hidden_size),
        muon_learning_rate=share * MUON_LEARNING_RATE, schedule="wsd", cooldown=1.0, clip=CLIP, keep="best", compile="on" if minutes >= COMPILE_FROM else "off",
    )  # fmt: skip


@checked
class Plan:
    """What a run is going to do, to be told before it starts and to be gone on with when it starts again. Raises InputError for a value that cannot be used."""

    texts: tuple[str, ...]
    """Paths or names of what is read."""
    minutes: float
    """The dial; 0 where the user's flags say it all."""
    vocab_size: int
    """Entries that the tokenizer was asked for."""
    tokenizer: str
    """Its kind or file."""
    model: str
    """Name of the model."""
    valid_tokens: int
    """Of the validation split, from its start, that are measured."""
    seconds: float
    """What the run is expected to take."""
    start: str = ""
    """Run directory whose weights it starts from."""
    chat: bool = False
    """Whether the texts are conversations."""
    train_rows: int | None = None
    """Rows of the training split that are used; None uses all."""
    valid_rows: int | None = None
    """Rows of the validation split that are used; None uses all."""
    lanes: int = 0
    """Of a text that is streamed; 0 where it is prepared whole."""

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values."""
        return dataclasses.asdict(self) | {"texts": list(self.texts)}

    @classmethod
    def from_dict(cls, values: object) -> Plan:
        """The inverse of `to_dict`. Raises InputError where it is no plan."""
        try:
            check_object("the plan", values)
            return cls(**values)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"the saved plan is broken ({error}): choose a new folder") from error
