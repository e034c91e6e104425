"""Training of the initial memory alone: everything else of a model stays as it is.

Along the recurrence, V0 is an additive term of every read (see gam_lm.mixers.gam), so that it can hold what a kind of text has in common.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import InputError
from gam_lm.inference.context_file import model_checksum
from gam_lm.inference.start_file import StartHeader, initial_memory, save_start
from gam_lm.model import LanguageModel
from gam_lm.training.loop import fit
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trained import Trained


@contextmanager
def only_trains(model: nn.Module, parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> Iterator[None]:
    """Inside, no parameter of ``model`` but ``parameters`` has gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def working_folder(out: Path) -> Path:
    """Where the training that will write ``out`` keeps its states."""
    return out.with_name(out.name + ".training")


def tune_initial_memory(model: LanguageModel, corpus: TokenCorpus, recipe: TrainConfig, out: Path) -> Trained:
    """Train the initial memory of ``model`` in place, and write it to ``out``.

    The training keeps its states in a folder beside ``out``, goes on from there when it is called again, and removes the folder in the end.

    Args:
        model: a trained one, with its own initial memory.
        corpus: prepared with the model's tokenizer.
        recipe: how to train.
        out: the file; see gam_lm.inference.start_file.

    Raises:
        InputError: for a model without such a memory, a file that is there, or a training that belongs to another model.
        DivergedError: as `gam_lm.training.loop.fit`.
        KeyboardInterrupt: likewise, after the state has been saved.
    """
    if out.exists():
        raise InputError(f"out is {str(out)!r}, which exists: choose another name, or remove it")
    memory = initial_memory(model)
    own = {name: parameter.detach().clone() for name, parameter in memory.items()}
    checksum, folder = model_checksum(model), working_folder(out)
    with only_trains(model, list(memory.values())):
        trained = fit(model, corpus, recipe, folder, label="initial memory")
    tuned = {name: parameter.detach().clone() for name, parameter in memory.items()}
    _set(memory, own)
    if model_checksum(model) != checksum:  # the states of the folder hold whole models
        raise InputError(f"out is {str(out)!r}, whose training in {folder} began with another model: remove that folder, or choose another name")
    _set(memory, tuned)
    save_start(out, model, StartHeader(model=checksum, data=corpus.name, tokens=trained.tokens))
    shutil.rmtree(folder)
    return trained


@torch.no_grad()
def _set(memory: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in memory.items():
        parameter.copy_(values[name])
