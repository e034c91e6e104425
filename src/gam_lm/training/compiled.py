"""Training through torch.compile: when it pays, and what is compiled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gam_lm.diagnostics.cost import model_cost
from gam_lm.inference.compiling import obstacle
from gam_lm.model import Block, LanguageModel
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

WORTH = {"cpu": 1e14, "cuda": 1e17}
"""Operations of a run from which on compiling pays: some ten minutes on a few cores, some minutes on a GPU. Counted, not timed, so that a run that was
killed and goes on makes the same choice."""

KEPT_ON_CPU = 0.8
"""Share of the activations that a compiled block keeps for its backward pass. What it makes again are the outputs of GELU and the like: a quarter of a
step's memory for no time that could be measured (docs/log.md)."""


def compile_for_training(model: LanguageModel, recipe: TrainConfig, total_steps: int) -> list[Block]:
    """Compile the blocks of ``model`` in place, as ``recipe.compile`` says; the first step then takes some seconds more.

    A block is compiled once for all layers, which are alike. Nothing changes but speed and rounding: dropout draws what it draws without.

    Returns:
        What was compiled, for `make_eager`; why nothing was is logged.
    """
    device = model.embed_tokens.weight.device
    if recipe.compile == "off" or not model.layers:  # a model of transformers has no blocks of ours
        return []
    if recipe.compile == "auto":
        flops = model_cost(model.config, recipe.context).training_flops * recipe.context * recipe.batch_size * total_steps
        if flops < WORTH.get(device.type, float("inf")):
            return []
    if reason := obstacle(device):
        logger.info("not compiled: %s", reason)
        return []
    blocks = [layer for layer in model.layers if layer.mixer.compiles(recipe.context)]
    if not blocks:
        logger.info("not compiled: %s with these options gains nothing by it", "-".join(model.config.mixers))
        return []
    torch.compiler.reset()  # what this process compiled before counts towards a limit, beyond which a block would stay eager
    for layer in blocks:
        layer.compile(dynamic=False, backend=_backend)
    logger.info("compiled: the blocks; the first step takes longer")
    return blocks


def _backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, with eager's random numbers; on a CPU it keeps only some of what the backward pass could make again from the rest."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    on_cpu = all(each.device.type == "cpu" for each in inputs if isinstance(each, Tensor))
    budget = config.activation_memory_budget  # 1, keep all, unless the user set it
    with config.patch(activation_memory_budget=min(budget, KEPT_ON_CPU) if on_cpu else budget):
        return compile_fx(graph, inputs, config_patches={"fallback_random": True})


def make_eager(parts: list[Block]) -> None:
    """Undo `compile_for_training`."""
    for part in parts:
        part._compiled_call_impl = None
