"""How exact a timed path is: its largest error against the plain PyTorch path in float64, beside its time.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.experiments.models import build, build_blocks
from gam_lm.model import LanguageModel
from gam_lm.training.precision import autocast

REFERENCE_TOKENS = 4096
"""Tokens of the reference: attention in float64 holds its scores whole. Of a longer sequence the first ones are compared, and no state."""


def plain(config: ModelConfig) -> ModelConfig:
    """``config`` on the implementations that take any format."""
    return config.replace(options=tuple(each.replace(backend="auto") for each in config.options))


@torch.no_grad()
def block_errors(run: Callable[..., Any], block: nn.Module, config: ModelConfig, x_BTD: Tensor) -> dict[str, float]:
    """``output_error`` and, where the sequence is short enough for the reference and there is one, ``state_error``.

    Args:
        run: the block as it is timed, called inside the caller's autocast.
        block: its weights.
        config: of the block, as `build_blocks` takes it.
        x_BTD: its input, of which the first row is compared.
    """
    T = x_BTD.shape[1]
    t = min(T, REFERENCE_TOKENS)
    reference, _ = build_blocks(plain(config), T)
    reference.load_state_dict(block.state_dict())
    y_BTD, state = run(x_BTD, None, None)
    with torch.autocast(x_BTD.device.type, enabled=False):
        exact_1TD, exact_state = reference.to(x_BTD.device).double()(x_BTD[:1, :t].double(), None, None)
    errors = {"output_error": largest_error(y_BTD[:1, :t], exact_1TD)}
    if t == T and state and exact_state:
        errors |= state_error(state, exact_state)
    return errors


def reference_of(model: LanguageModel) -> LanguageModel:
    """The plain model of the same weights in float64, for evaluation."""
    device = next(model.parameters()).device
    reference = build(plain(model.config), 0, device)
    reference.load_state_dict(model.state_dict())
    return reference.double().eval()


def model_errors(model: LanguageModel, reference: LanguageModel, tokens_BT: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """``output_error`` of what the output head reads and ``state_error``, where there is a state, of a model as it is timed.

    Args:
        model: called under autocast to ``dtype``, as its steps are.
        reference: as `reference_of` made it.
        tokens_BT: of which the first row is compared.
    """
    T = tokens_BT.shape[1]
    t = min(T, REFERENCE_TOKENS)
    with autocast(tokens_BT.device, dtype):
        h_BTD, state = model.hidden(tokens_BT)
    with torch.no_grad():
        exact_1TD, exact_state = reference.hidden(tokens_BT[:1, :t])
    errors = {"output_error": largest_error(h_BTD.detach()[:1, :t], exact_1TD)}
    if t == T:
        errors |= state_error([each.detach() for layer in state.layers for each in layer], [each for layer in exact_state.layers for each in layer])
    return errors


def state_error(state: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """The largest ``state_error`` of the tensors of a state, whose first rows are compared; nothing where none holds numbers."""
    errors = [largest_error(x[:1], y[:1]) for x, y in zip(state, exact, strict=True) if x.is_floating_point() and x.numel()]
    return {"state_error": max(errors)} if errors else {}


def largest_error(x: Tensor, exact: Tensor) -> float:
    """max |x − x₆₄| / max |x₆₄|."""
    error, size = (x.double() - exact).abs().max(), exact.abs().max()
    return float(error / size) if size > 0 else float(error)
