"""Two portable graphs of a trained model, of plain operators alone, with the state as plain tensors in and out.

    prefill   (tokens (B, P), state…) → (logits (B, V) after the last token, state…)
    step      (tokens (B, 1), state…) → (logits (B, V), state…)

A sequence starts from zeros. P is free for a static memory. A written memory takes exactly ``chunk_size`` tokens a call, its chunk: a prompt runs
through prefill as often as it holds P tokens, and through step for what is left. Any split gives what one pass gives.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gam_lm.errors import InputError
from gam_lm.inference.context import state_tensors
from gam_lm.model import LanguageModel, State

TRACED_ROWS, TRACED_TOKENS = 2, 37
"""Sizes of the example that is traced; where a size is free they leave no mark."""

FEWEST_FREE = 2
"""The tracer takes no smaller number for one that is free, and no range of one number."""


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """What was traced."""

    prefill: ExportedProgram
    """The program for P tokens."""
    step: ExportedProgram
    """The program for one token."""
    prefill_tokens: int | None
    """P, or None where any number of tokens from 2 on will do."""
    state_names: tuple[str, ...]
    """Names of the state's tensors, in the order of inputs and outputs: position, then layer by layer."""


class StreamCall(nn.Module):
    """One call of `LanguageModel.stream` on plain tensors, of which the last token's logits are kept."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, V) after the last token, and the new state."""
        h_BTD, new = self.model.hidden(tokens, unflatten_state(self.model, state))
        return self.model.lm_head(h_BTD[:, -1]), state_tensors(new)


def trace(model: LanguageModel) -> Graphs:
    """Trace both graphs of ``model``, which is in evaluation mode.

    Raises:
        InputError: for a mixer whose forward pass no graph of fixed size holds.
    """
    sizes = {layer.mixer.prefill_tokens for layer in model.layers}
    if None in sizes:
        names = sorted({type(layer.mixer).__name__ for layer in model.layers if layer.mixer.prefill_tokens is None})
        raise InputError(f"mixers is {list(model.config.mixers)}: the graph of {' and '.join(names)} depends on the length of the text and is not exported")
    if len(blocks := sizes - {0}) > 1:
        raise InputError(f"chunk_size differs between the mixers ({sorted(map(str, blocks))}): use one number for all to export them as one graph")
    limit = model.config.longest
    block = min(next(iter(blocks)) or 0, limit or 2**62) if blocks else None
    if block is None and limit is not None and limit <= FEWEST_FREE:
        block = limit
    tokens = block or min(TRACED_TOKENS, limit or TRACED_TOKENS)
    return Graphs(
        prefill=_trace(model, tokens, Dim("tokens", min=FEWEST_FREE, max=limit) if block is None else None),
        step=_trace(model, 1, None),
        prefill_tokens=block,
        state_names=names_of_state(model),
    )


def _trace(model: LanguageModel, tokens: int, length: Dim | None) -> ExportedProgram:
    rows = Dim("batch", min=1)
    state = state_tensors(model.initial_state(TRACED_ROWS))
    tokens_BT = torch.zeros(TRACED_ROWS, tokens, dtype=torch.long, device=state[0].device)
    shapes = ({0: rows} if length is None else {0: rows, 1: length}, [{0: rows} for _ in state])
    with torch.no_grad():
        return torch.export.export(StreamCall(model), (tokens_BT, state), dynamic_shapes=shapes, strict=False)


def names_of_state(model: LanguageModel) -> tuple[str, ...]:
    """Names of the tensors of `state_tensors`."""
    return ("position", *(f"layer{i}.{j}" for i, layer in enumerate(model.initial_state(1).layers) for j in range(len(layer))))


def unflatten_state(model: LanguageModel, tensors: list[Tensor]) -> State:
    """The inverse of `state_tensors`."""
    rest = iter(tensors[1:])
    sizes = [len(layer.mixer.initial_state(1, device="meta")) for layer in model.layers]
    return State(tensors[0], tuple(tuple(next(rest) for _ in range(size)) for size in sizes))
