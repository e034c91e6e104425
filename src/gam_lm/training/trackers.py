"""Where the figures of a run go besides its metrics.jsonl: a tracker by name, optional, never required."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from gam_lm.errors import InputError, MissingExtraError

TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """Takes the figures of one step; makes nothing before `start`."""

    def start(self, step: int) -> None:
        """Begin, or go on after ``step``: the run owns its directory now."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record ``figures`` at ``step``."""

    def finish(self) -> None:
        """Write out what is still held."""


class NoTracker:
    """Records nothing."""

    def start(self, step: int) -> None:
        """Nothing to do."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class TensorBoardTracker:
    """Event files in the run directory."""

    def __init__(self, directory: Path) -> None:
        try:
            self._kind = import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "track", "tracker tensorboard") from error
        self._directory = directory / "tensorboard"

    def start(self, step: int) -> None:
        """Open an event file; what an earlier one says of later steps is void."""
        self._writer = self._kind(str(self._directory), purge_step=step + 1 if step else None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record ``figures`` at ``step``."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases, or trackio, which speaks the same calls."""

    def __init__(self, package: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            self._module = import_module(package)
        except ImportError as error:
            raise InputError(f"tracker {package} needs {package}: pip install {package}") from error
        self._name, self._config = name, dict(config)

    def start(self, step: int) -> None:
        """Register the run."""
        self._module.init(project="gam-lm", name=self._name, config=self._config)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record ``figures`` at ``step``."""
        self._module.log(dict(figures), step=step)

    def finish(self) -> None:
        """End the run."""
        self._module.finish()


def make_tracker(name: TrackerName, directory: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker called ``name``. Raises InputError with the pip command where its package is not installed."""
    if name == "none":
        return NoTracker()
    if name == "tensorboard":
        return TensorBoardTracker(directory)
    return WandbTracker(name, directory.name, config)
