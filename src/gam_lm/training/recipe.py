"""How a model is trained: one flat, frozen description. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from gam_lm.errors import InputError, unknown_name

CHOICES = {
    "precision": ("auto", "fp32", "bf16"), "compile": ("auto", "on", "off"), "decay": ("matrices", "everything"), "blocks": ("overlapping", "paper"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training recipe. Raises InputError for a value that cannot be used."""

    steps: int | None = None
    """Optimiser steps; None trains for ``epochs``."""
    epochs: float = 1.0
    """Passes over the training split where ``steps`` is not given."""
    batch_size: int = 16
    """Sequences per optimiser step."""
    context: int = 256
    """Tokens per sequence."""
    accumulate: int = 1
    """Parts that a batch is computed in; the gradient is that of the whole batch."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW, after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up, at most a tenth of the run; a cosine to 0 follows."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's moments."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay: Literal["matrices", "everything"] = "matrices"
    """What decays: weight matrices and embeddings, or biases and norms as well (the paper's protocol)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the matrix products; auto takes bf16 where the device computes it natively."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the blocks through torch.compile, the same losses to rounding; auto where the run is long enough to pay for it."""
    seed: int = 0
    """Seed of the start values, the order of the blocks and dropout."""
    validate_every: int | None = None
    """Steps between validations over the whole split; None validates at the end alone."""
    checkpoint_every: int = 200
    """Steps between checkpoints from which a killed run goes on."""
    blocks: Literal["overlapping", "paper"] = "overlapping"
    """overlapping: blocks of context + 1 that advance by context, so that every token is predicted; paper: that advance by context + 1."""
    paper_warmup: bool = False
    """Take ``warmup_steps`` as it stands however short the run is."""

    def __post_init__(self) -> None:
        for field in ("batch_size", "context", "accumulate", "checkpoint_every"):
            _at_least(self, field, 1)
        for field in ("steps", "validate_every"):
            if getattr(self, field) is not None:
                _at_least(self, field, 1)
        _at_least(self, "warmup_steps", 0)
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate is {self.accumulate}, which does not divide batch_size={self.batch_size}: use a divisor")
        for field in ("learning_rate", "epochs"):
            if not getattr(self, field) > 0:
                raise InputError(f"{field} is {getattr(self, field)!r}: use a number above 0")
        for field in ("weight_decay", "clip"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)!r}: use 0 or more")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise unknown_name(field, str(getattr(self, field)), choices)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the run."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * steps_per_epoch))

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of step 0 … total_steps − 1: linear warm-up, then a cosine to 0."""
        warmup = self.warmup_steps if self.paper_warmup else min(self.warmup_steps, total_steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; an unknown key is an error."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise unknown_name("key in the recipe", key, fields)
        if "betas" in values:
            values = values | {"betas": tuple(values["betas"])}
        return cls(**values)


def _at_least(config: TrainConfig, field: str, least: int) -> None:
    value = getattr(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{field} is {value!r}: use a whole number of at least {least}")
