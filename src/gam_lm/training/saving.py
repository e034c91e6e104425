"""What a run writes as it goes: its model for whoever loads it, and the state from which it goes on; of a sharded run all processes together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gam_lm.checkpoint import save_model
from gam_lm.model import LanguageModel
from gam_lm.training.averaging import Average
from gam_lm.training.distributed import World
from gam_lm.training.sharded_state import Writer, flat_state
from gam_lm.training.sharding import gathered, is_sharded
from gam_lm.training.state import Progress, moments_of, own_weights, place_of, remove_older, save_state, write_numbers


class Saving:
    """Writes the directory of one run. All processes make the same calls.

    Args:
        directory: of the run.
        model: as it is trained.
        optimizer: of its parameters.
        average: of the weights, which is what others get to see; None where the run keeps none.
        tokenizer: written beside the model.
        world: the processes; rank 0 writes what is not sharded.
    """

    def __init__(
        self, directory: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, average: Average | None, tokenizer: Tokenizer, world: World
    ) -> None:
        self._directory, self._model, self._optimizer, self._average, self._tokenizer, self._world = directory, model, optimizer, average, tokenizer, world
        self._writer = Writer() if is_sharded(model) else None

    def best(self, folder: Path) -> None:
        """Write the weights of a validation to ``folder``."""
        self._model_to(folder, None)

    def kept(self) -> None:
        """Write the weights as they are, which the run ends with."""
        model = gathered(self._model) if self._writer is not None else self._model
        self._world.first(lambda: None if model is None else save_model(self._directory, model, self._tokenizer))

    def save(self, progress: Progress, best: Path, *, model: bool) -> None:
        """Write the state, in the background where the run is sharded, and remove all best weights but those in ``best``.

        With ``model=False`` a sharded run leaves the model beside it as it is, for gathering it stops the training.
        """
        if self._writer is None:
            if self._world.rank == 0:
                self._model_to(self._directory, self._tokenizer, together=False)
                save_state(self._directory, progress, self._model, self._optimizer, self._averaged)
                self._remove_other_best(best)
            return
        if model:
            self._model_to(self._directory, self._tokenizer)
        path = place_of(self._directory, progress)
        written = self._world.first(path.is_dir)
        if self._world.any(bool(written)):
            return
        tensors = flat_state(own_weights(self._model), moments_of(self._optimizer), self._averaged)
        self._writer.save(path, tensors, partial(write_numbers, progress=progress, shown=path), partial(self._written, path, best))

    def poll(self) -> None:
        """Between two steps: give a state that has been written meanwhile its name."""
        if self._writer is not None:
            self._writer.poll()

    def finish(self) -> None:
        """Wait for a state that is being written."""
        if self._writer is not None:
            self._writer.finish()

    def in_place(self) -> AbstractContextManager[None]:
        """Within the block the model has the weights that others get to see."""
        return nullcontext() if self._average is None else self._average.in_place()

    @property
    def _averaged(self) -> Mapping[str, Tensor] | None:
        return None if self._average is None else self._average.tensors

    def _model_to(self, folder: Path, tokenizer: Tokenizer | None, *, together: bool = True) -> None:
        with self.in_place():
            model = gathered(self._model) if self._writer is not None else self._model

            def write() -> None:
                if model is not None:
                    save_model(folder, model, tokenizer)

            if together:
                self._world.first(write)
            else:
                write()

    def _written(self, path: Path, best: Path) -> None:
        remove_older(self._directory, path)
        self._remove_other_best(best)

    def _remove_other_best(self, best: Path) -> None:
        for other in (self._directory / "state").glob("best-*"):
            if other != best:
                shutil.rmtree(other)
