"""The registry of mixers: a new mixer is its options, its module and one line here, or one call of `register` from outside. Imports no torch.

A name that ends with a colon is a family: ``hf:llama`` belongs to ``hf:``.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from gam_lm.errors import InputError, unknown_name
from gam_lm.mixers.options import MixerOptions

if TYPE_CHECKING:
    from gam_lm.config import ModelConfig
    from gam_lm.mixers.base import Mixer

logger = logging.getLogger("gam_lm")


class Entry(NamedTuple):
    """Where a mixer lives: its classes, or ``module:name`` of each, which is imported when asked for."""

    options: str | type[MixerOptions]
    """The options class."""
    mixer: str | type[Mixer] | None
    """The module class; None for a family of whole models."""


REGISTRY: dict[str, Entry] = {
    "gam": Entry("gam_lm.mixers.gam_options:GAMOptions", "gam_lm.mixers.gam:GAMMixer"),
    "attention": Entry("gam_lm.mixers.attention_options:AttentionOptions", "gam_lm.mixers.attention:Attention"),
    "gated_deltanet": Entry("gam_lm.mixers.gated_deltanet_options:GatedDeltaNetOptions", "gam_lm.mixers.gated_deltanet:GatedDeltaNet"),
    "mamba": Entry("gam_lm.mixers.mamba_options:MambaOptions", "gam_lm.mixers.mamba:Mamba"),
    "hf:": Entry("gam_lm.hf.baseline_options:BaselineOptions", None),
}
"""Every mixer by its name in ``ModelConfig.mixers``."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Colons are for families; plus signs, dots and commas divide the names of models and flags."""

DEFAULT_MIXER = "gam"
"""What mixes the tokens where the configuration does not say."""


def register(name: str, options: type[MixerOptions], mixer: type[Mixer]) -> None:
    """Make a mixer known under ``name``: in ``ModelConfig.mixers``, on the command line and in every table.

    Raises:
        InputError: for a name that another mixer has, or that no flag and no model's name can hold.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"mixer {name!r}: use letters, digits, '_' and '-' for its name, a letter first")
    if name in REGISTRY and REGISTRY[name] != Entry(options, mixer):
        raise InputError(f"mixer {name!r} is registered already: choose another name")
    REGISTRY[name] = Entry(options, mixer)


def mixer_names() -> list[str]:
    """Every registered mixer, families left out."""
    return [name for name in REGISTRY if not name.endswith(":")]


def options_class(name: str) -> type[MixerOptions]:
    """The options class of the mixer called ``name``. Raises InputError with the nearest known name."""
    found: type[MixerOptions] = _loaded(_entry(name).options)
    return found


def mixer_class(name: str) -> type[Mixer]:
    """The module class of the mixer called ``name``. Raises InputError with the nearest known name, and for a whole model of another library."""
    entry = _entry(name)
    if entry.mixer is None:
        raise InputError(f"mixer {name!r} is a whole model of another library: it is a baseline of `gam bench`, not a part of a stack")
    found: type[Mixer] = _loaded(entry.mixer)
    return found


def log_backends(config: ModelConfig, device: str) -> None:
    """Say which implementation each rule of a model takes on ``device`` ("cpu", "cuda:1"), each choice once a process."""
    for name in dict.fromkeys(config.mixers):
        kind = mixer_class(name)
        if rule := kind.rule(config):
            _log_once(f"{rule}: {kind.backend_name(config, device)} on {device}")


@cache
def _log_once(line: str) -> None:
    logger.info(line)


def _entry(name: str) -> Entry:
    family = name.partition(":")[0] + ":" if ":" in name else name
    if family not in REGISTRY:
        raise unknown_name("mixer", name, REGISTRY)
    return REGISTRY[family]


def _loaded(where: Any) -> Any:
    if not isinstance(where, str):
        return where
    module, attribute = where.split(":")
    return getattr(import_module(module), attribute)
