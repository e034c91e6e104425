"""Where a number that is not finite came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gam_lm.data.blocks import evaluation_blocks
from gam_lm.data.tokens import Split
from gam_lm.errors import DivergedError
from gam_lm.model import LanguageModel
from gam_lm.training.precision import autocast
from gam_lm.training.sharding import is_sharded, local


def broken_weight(model: nn.Module) -> str | None:
    """The first weight that is not finite, by name, or None; of a sharded model on any process, all of which ask."""
    finite = torch.stack([torch.isfinite(local(p)).all() for p in model.parameters()])
    if is_sharded(model):
        everywhere = finite.int()
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        finite = everywhere.bool()
    return None if bool(finite.all()) else [name for name, _ in model.named_parameters()][int(finite.int().argmin())]


def diverged(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, dtype: torch.dtype, loss: Tensor, rate: float) -> DivergedError:
    """Why a step cannot be taken: looks at weights, then at a forward pass, then at the gradients that are there.

    Args:
        model: whose gradients are those of the step; its random generators are left as they are.
        tokens_BT: the batch of the step.
        targets_BT: what follows each token.
        dtype: of the products.
        loss: of the step.
        rate: its learning rate.
    """
    what = "the gradient" if bool(torch.isfinite(loss)) else "the loss"
    if (weight := broken_weight(model)) is not None:
        return DivergedError("a weight", weight, rate)
    layer = _first_output(model, tokens_BT, targets_BT, dtype)
    if layer is None:  # the backward pass runs from the last layer to the first
        broken = [name for name, weight in model.named_parameters() if weight.grad is not None and not bool(torch.isfinite(local(weight.grad)).all())]
        layers = [name for name in broken if "embed" not in name]
        layer = f"the gradient of {(layers or broken)[-1]}" if broken else "the loss"
    return DivergedError(what, layer, rate)


def validation_diverged(model: LanguageModel, split: Split, context: int, rate: float, *, overlap: bool) -> DivergedError:
    """What the first validation block whose loss is not finite says; ``rate`` is the learning rate of the last step."""
    device = model.embed_tokens.weight.device
    for batch in evaluation_blocks(split.ids, context=context, batch_size=1, overlap=overlap, marks=split.marks):
        tokens_BT, targets_BT, *segments = (torch.from_numpy(part).to(device) for part in batch)
        with torch.no_grad():
            _, loss = model(tokens_BT, targets_BT, segments=segments[0] if segments else None, return_logits=False)
        if not bool(torch.isfinite(loss)):
            return diverged(model, tokens_BT, targets_BT, torch.float32, loss, rate)
    return DivergedError("the validation loss", "the matrix products in low precision", rate)


@torch.no_grad()
def _first_output(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, dtype: torch.dtype) -> str | None:
    """The part of the model whose output is the first that is not finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not bool(torch.isfinite(each).all()) for each in _tensors(output)):
                found.append(name)

        return hook

    device = tokens_BT.device
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"), autocast(device, dtype):
            model(tokens_BT, targets_BT, return_logits=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)
