"""gam-lm: Gated Associative Memory language models.

The public names, each loaded when first asked for, so that importing the package loads neither torch nor anything else that is heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "GatedAssociativeMemory": "mixers.layer",
    "AttentionOptions": "mixers.attention_options",
    "GAMOptions": "mixers.gam_options",
    "GatedDeltaNetOptions": "mixers.gated_deltanet_options",
    "InputError": "errors",
    "LanguageModel": "model",
    "MambaOptions": "mixers.mamba_options",
    "ModelConfig": "config",
    "State": "model",
    "TrainConfig": "training.recipe",
    "generate": "inference.generation",
    "generate_text": "inference.generation",
    "load_model": "checkpoint",
    "load_reference": "reference",
    "register": "mixers.registry",
    "save_model": "checkpoint",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from gam_lm.checkpoint import load_model as load_model
    from gam_lm.checkpoint import save_model as save_model
    from gam_lm.config import ModelConfig as ModelConfig
    from gam_lm.errors import InputError as InputError
    from gam_lm.inference.generation import generate as generate
    from gam_lm.inference.generation import generate_text as generate_text
    from gam_lm.mixers.layer import GatedAssociativeMemory as GatedAssociativeMemory
    from gam_lm.model import LanguageModel as LanguageModel
    from gam_lm.model import State as State
    from gam_lm.reference import load_reference as load_reference
    from gam_lm.training.recipe import TrainConfig as TrainConfig


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gam_lm' has no attribute {name!r}")
    return getattr(import_module(f"gam_lm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
