"""One graph for prefill and decode: any number of tokens at once, one included.

    (tokens (B, T), state…) → (logits (B, V) after the last token, state…)

It holds the operators of gam_lm.export.operators, which PyTorch does not compute: it is for ONNX. A cache of attention without a window grows; its tensors
have the free dimension ``cached``, which is 0 where a sequence starts.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.export import Dim, ExportedProgram

from gam_lm.errors import InputError
from gam_lm.export.graphs import TRACED_ROWS, TRACED_TOKENS, StreamCall, names_of_state
from gam_lm.export.operators import as_operators
from gam_lm.inference.context import state_tensors
from gam_lm.model import LanguageModel

TRACED_CACHE = 5
"""Cached tokens of the example that is traced; where their number is free it leaves no mark."""


@dataclass(frozen=True, kw_only=True)
class StreamGraph:
    """What was traced."""

    program: ExportedProgram
    """The program for T tokens."""
    state_names: tuple[str, ...]
    """Names of the state's tensors, in the order of inputs and outputs: position, then layer by layer."""


def trace_stream(model: LanguageModel) -> StreamGraph:
    """Trace the graph of ``model``, which is in evaluation mode.

    Raises:
        InputError: for a mixer that depends on the number of tokens other than through the operators.
    """
    limit = model.config.longest
    tokens, cache = (min(each, limit or each) for each in (TRACED_TOKENS, TRACED_CACHE))
    device = model.embed_tokens.weight.device
    with torch.no_grad():
        first = state_tensors(model.initial_state(TRACED_ROWS))
        state = state_tensors(model.stream(torch.zeros(TRACED_ROWS, cache, dtype=torch.long, device=device))[1])
    rows, length, cached = Dim("batch", min=1), Dim("tokens", min=1, max=limit), Dim("cached", min=0)
    free = []
    for before, after in zip(first, state, strict=True):
        sizes = zip(before.shape, after.shape, strict=True)
        free.append({i: rows if i == 0 else cached for i, (start, later) in enumerate(sizes) if i == 0 or start != later})
    try:
        with torch.no_grad(), as_operators():
            example = (torch.zeros(TRACED_ROWS, tokens, dtype=torch.long, device=device), state)
            program = torch.export.export(StreamCall(model), example, dynamic_shapes=({0: rows, 1: length}, free), strict=False)
    except torch._dynamo.exc.UserError as error:  # the constraint on T that a mixer put up
        kinds = sorted({type(layer.mixer).__name__ for layer in model.layers if layer.mixer.prefill_tokens is None})
        if not kinds:
            raise
        raise InputError(
            f"mixers is {list(model.config.mixers)}: the graph of {' or '.join(kinds)} depends on the length of the text and is not exported"
        ) from error
    return StreamGraph(program=program, state_names=names_of_state(model))
