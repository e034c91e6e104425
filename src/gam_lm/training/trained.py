"""What a finished run knows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from gam_lm.training.evaluate import Evaluation


@dataclass(kw_only=True)
class Trained:
    """What a finished run knows of itself."""

    steps: int
    """Optimiser steps."""
    tokens: int
    """Predicted tokens of training."""
    seconds: float
    """Seconds of training, validation and checkpoints left out."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Validations: step, tokens, seconds, train_nats, val_nats."""
    precision: str
    """Number format of the matrix products."""
    compiled: bool
    """Whether the blocks ran through torch.compile."""
    validation: Evaluation
    """The last validation, over the whole split: of the weights that are kept."""
    kept_step: int
    """The step whose weights are kept: the last, or with ``keep="best"`` that of the best validation."""
    last: Evaluation | None = None
    """Of the last weights, where others are kept."""
