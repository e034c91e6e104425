"""Which optimiser moves which parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gam_lm.training.muon import Muon
from gam_lm.training.recipe import MUON_LEARNING_RATE, TrainConfig


class Together(torch.optim.Optimizer):
    """Several optimisers as one: one list of groups, one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([{"params": part_group["params"]} for part in parts for part_group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # the parts' own: a learning rate set here is set there

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every part."""
        assert closure is None  # no caller has one
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts, their parameters numbered through."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part in self.parts:
            own, start = part.state_dict(), sum(len(group["params"]) for group in groups)
            state |= {start + number: values for number, values in own["state"].items()}
            groups += [group | {"params": [start + number for number in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        groups, start = list(state_dict["param_groups"]), 0
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            end = start + sum(len(group["params"]) for group in own)
            part.load_state_dict({
                "state": {number - start: values for number, values in state_dict["state"].items() if start <= number < end},
                "param_groups": [group | {"params": [number - start for number in group["params"]]} for group in own],
            })  # fmt: skip
            start = end
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(model: nn.Module, recipe: TrainConfig, processes: int = 1) -> torch.optim.Optimizer:
    """The optimiser that ``recipe`` names; set its learning rates with `set_rate`. ``processes`` share the work of its steps.

    Frozen parameters are left out. With ``decay="matrices"`` biases, norms and other vectors do not decay. A parameter with the attribute ``no_weight_decay = True`` never does.
    """
    matrices = list(hidden_matrices(model)) if recipe.optimizer == "muon" else []
    named = {parameter for parameter, _ in matrices}
    others = [p for p in model.parameters() if p not in named and p.requires_grad]
    if not matrices:
        return _adamw(others, recipe)
    rate = recipe.muon_learning_rate or MUON_LEARNING_RATE
    factor = rate / recipe.learning_rate
    muon = Muon(matrices, rate, recipe.weight_decay / factor, processes=processes)  # a step shrinks these weights as much as those of AdamW
    for group in muon.param_groups:
        group["factor"] = factor
    return Together([muon, _adamw(others, recipe)]) if others else Together([muon])


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set AdamW's learning rate to ``rate`` and Muon's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def hidden_matrices(model: nn.Module) -> Iterator[tuple[Any, Sequence[int]]]:
    """The weight matrices between embedding and output head, each with the row counts of the logical matrices that it is stacked from.

    A module with a method ``matrices`` speaks for all that is below it; elsewhere every nn.Linear is one matrix. Frozen weights, embeddings and what shares
    their weight, and the output head are left out.
    """
    left_out = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    if head is not None:
        left_out.add(head.weight)
    seen: set[nn.Parameter] = set()
    for parameter, rows in _matrices(model):
        if parameter not in left_out and parameter not in seen and parameter.requires_grad:
            seen.add(parameter)
            yield parameter, rows


def _matrices(module: nn.Module) -> Iterator[tuple[Any, Sequence[int]]]:
    own = getattr(module, "matrices", None)
    if own is not None:
        yield from own()
    elif isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter):
        yield module.weight, (module.out_features,)
    else:
        for child in module.children():
            yield from _matrices(child)


def _adamw(parameters: Sequence[nn.Parameter], recipe: TrainConfig) -> torch.optim.AdamW:
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for p in parameters:
        decays = (recipe.decay == "everything" or p.dim() >= 2) and not getattr(p, "no_weight_decay", False)
        (decayed if decays else kept).append(p)
    groups = [{"params": group, "weight_decay": decay} for group, decay in ((decayed, recipe.weight_decay), (kept, 0.0)) if group]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
