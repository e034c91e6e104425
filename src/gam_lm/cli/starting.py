"""The model that a command starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gam_lm.model import LanguageModel


def load_started(run_directory: Path, start: Path | None, device: str) -> LanguageModel:
    """The model of a run directory, with the initial memory of the file ``start`` where one is given. Raises InputError as its parts do."""
    from gam_lm.checkpoint import load_model
    from gam_lm.inference.start_file import load_start
    from gam_lm.training.precision import choose_device

    model = load_model(run_directory, device=choose_device(device))
    if start is not None:
        load_start(start, model)
    return model
