"""What mixes the tokens of a block. The registry: a new mixer is one file and one line here.

This module imports no torch; :func:`mixer_class` imports the one file that is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gam_lm.errors import unknown_name

if TYPE_CHECKING:
    from gam_lm.mixers.base import Mixer

REGISTRY = {
    "gam": "gam_lm.mixers.gam:GAMMixer",
    "attention": "gam_lm.mixers.attention:Attention",
    "mamba": "gam_lm.mixers.mamba:Mamba",
}


def mixer_class(name: str) -> type[Mixer]:
    """The mixer registered under ``name``. Raises InputError with the nearest known name."""
    if name not in REGISTRY:
        raise unknown_name("mixer", name, REGISTRY)
    module, attribute = REGISTRY[name].split(":")
    mixer: type[Mixer] = getattr(import_module(module), attribute)
    return mixer
