"""A model that was not trained yet."""

from __future__ import annotations

import torch

from gam_lm.config import ModelConfig
from gam_lm.mixers.registry import log_backends
from gam_lm.model import LanguageModel


def new_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> LanguageModel:
    """A model whose initial values are a function of ``seed`` alone."""
    torch.manual_seed(seed)
    log_backends(config, str(device))
    return LanguageModel(config).to(device)
