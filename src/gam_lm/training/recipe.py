"""How a model is trained: one flat, frozen description. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gam_lm.errors import InputError, check_object, checked, unknown_name

Count = Annotated[int, Field(ge=1, le=10**12)]
Share = Annotated[float, Field(ge=0, lt=1)]

BEFORE_MUON: Mapping[str, Any] = {"optimizer": "adamw"}
"""What recipes meant that were saved when AdamW was the only optimiser: they do not name it."""

MUON_LEARNING_RATE = 0.02
"""What Muon's authors publish for hidden matrices; its updates have the same size at every width, so that one value serves all widths."""


def free_to_change(recipe: Mapping[str, Any]) -> frozenset[str]:
    """The fields of a recipe, given as `TrainConfig.to_dict` does, that may change when a run goes on: they alter no weight that is kept.

    The best state is the best of those that are validated.
    """
    return frozenset({"checkpoint_every"} if recipe.get("keep") == "best" else {"checkpoint_every", "validate_every"})


@checked
class TrainConfig:
    """A training recipe. Raises InputError for a value that cannot be used.

    Optimiser, learning rates and clip follow results/anatomy: 128 wide, Muon was better than AdamW for each of three models.
    """

    steps: Count | None = None
    """Optimiser steps; where it is not given, ``epochs`` decides."""
    epochs: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Passes over the training split where ``steps`` is not given."""
    batch_size: Count = 16
    """Sequences per optimiser step."""
    context: Count = 256
    """Tokens per sequence."""
    accumulate: Count = 1
    """Parts that a batch is computed in; the gradient is that of the whole batch."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon for the hidden weight matrices, with adamw for the rest; adamw for every parameter."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.2e-2
    """Highest learning rate of AdamW, after the warm-up."""
    muon_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate of Muon; 0.02 where it is not given."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: cosine to 0, or wsd, a constant learning rate with a linear cool-down to 0."""
    cooldown: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run that wsd cools down in."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**12)] = 100
    """Steps of linear warm-up, at most a tenth of the run."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of AdamW's moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay: a step shrinks a weight by this times AdamW's learning rate, also where Muon moves it."""
    decay: Literal["matrices", "everything"] = "matrices"
    """What decays: weight matrices and embeddings, or biases and norms as well (the paper's protocol)."""
    clip: Annotated[float, Field(ge=0)] = 0.1
    """Largest norm of the gradient; 0 leaves it alone."""
    ema: Share = 0.0
    """Decay of an average of the weights, which is validated and saved in place of them; 0 takes the weights themselves."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the matrix products; auto takes bf16 where the device computes it natively."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the blocks through torch.compile, the same losses to rounding; auto where the run is long enough to pay for it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initialisation, the order of the blocks and dropout."""
    validate_every: Count | None = None
    """Steps between validations; where it is not given there is one at the end."""
    checkpoint_every: Count = 200
    """Steps between checkpoints from which a killed run goes on; one is also written every minute and after each validation."""
    blocks: Literal["overlapping", "paper"] = "overlapping"
    """overlapping: blocks of context + 1 that advance by context, so that every token is predicted; paper: that advance by context + 1."""
    shuffle_documents: bool = False
    """Put the documents in a new order every epoch before they are cut into blocks."""
    keep: Literal["last", "best"] = "last"
    """Which weights the run ends with: its last, or those of its best validation."""
    paper_warmup: bool = False
    """Take ``warmup_steps`` as it stands however short the run is."""

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate is {self.accumulate}, which does not divide batch_size={self.batch_size}: use a divisor")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the run."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * steps_per_epoch))

    def rate(self, step: int, total_steps: int) -> float:
        """AdamW's learning rate at step 0 … total_steps − 1: linear warm-up, then the schedule. Muon's follows in proportion."""
        warmup = self.warmup_steps if self.paper_warmup else min(self.warmup_steps, total_steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "wsd":
            return self.learning_rate * min(1.0, (total_steps - step) / max(1, round(self.cooldown * total_steps)))
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def same_run(self, other: TrainConfig) -> bool:
        """Whether ``other`` makes the same weights, so that a run of one may go on as a run of the other."""
        mine, theirs = self.to_dict(), other.to_dict()
        return all(mine[name] == theirs[name] for name in mine if name not in free_to_change(mine))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values, validated again."""
        return TrainConfig(**({field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; an unknown key is an error, a missing one has its default (the optimiser: AdamW, `BEFORE_MUON`)."""
        check_object("the recipe", values)
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise unknown_name("key in the recipe", key, fields)
        return cls(**{**BEFORE_MUON, **values})
