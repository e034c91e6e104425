"""torch.compile, where it can be had: the compiler it needs, and the two things that are compiled, training blocks and the step of decoding.

Shapes: B rows, V = vocab_size.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from gam_lm.inference.context import state_tensors
from gam_lm.inference.int8 import is_int8
from gam_lm.model import LanguageModel, State
from gam_lm.ops.int8_products import integers_for_few_rows
from gam_lm.ops.row_products import MAX_ROWS, row_backend

Step = Callable[[Tensor, State], tuple[Tensor, State]]
"""One token of each row (B, 1) and the state before it → logits (B, 1, V) and the state after it."""


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for ``device`` here, or None."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r} found"
    if device.type == "cuda" and find_spec("triton") is None:
        return "no triton found"
    return None


def decoder(model: LanguageModel, state: State, variant: str = "eager") -> Callable[[Tensor], Tensor]:
    """Decode from ``state`` on: a call on the next token of each row (B, 1) gives its logits (B, 1, V) and carries the state.

    Args:
        model: in evaluation mode, its weights as they are now.
        state: of what came before, of which neither variant but eager may change the shapes (a cache in place does not).
        variant: eager; compiled (on a GPU as a CUDA graph as well); or graph, the eager step as a CUDA graph.
    """
    step: Step = model.stream
    if variant != "eager":
        any_B1 = torch.zeros(len(state.position_B), 1, dtype=torch.long, device=state.position_B.device)
        step = compiled_step(model, any_B1, state) if variant == "compiled" else step
        if any_B1.device.type == "cuda":
            return graphed_step(step, any_B1, state)

    def next_logits(token_B1: Tensor) -> Tensor:
        nonlocal state
        logits_B1V, state = step(token_B1, state)
        return logits_B1V

    return next_logits


def why_not_decoding(model: LanguageModel) -> str | None:
    """Why decoding cannot be compiled for ``model`` here, or None."""
    for layer in model.layers:
        if layer.mixer.filled_cache(1, 1, 1, dtype=torch.float32) is not None:
            return f"the state of {type(layer.mixer).__name__} grows with every token"
    return obstacle(model.embed_tokens.weight.device)


def compiled_step(model: LanguageModel, token_B1: Tensor, state: State) -> Step:
    """``model.stream`` for one token, compiled: for inference alone, with the weights as they are now.

    On a CPU the products of up to three rows are loops over the weights (`gam_lm.ops.row_products`); for more rows the weights are copied into the layout
    that its matrix unit reads fastest. On a GPU see `graphed_step`.

    Args:
        model: in evaluation mode; what is changed in its modules afterwards is not seen.
        token_B1: any tokens; only the shape counts.
        state: of any sequence; only the shapes count, and what is written in place is overwritten later. Tensors of other shapes are compiled anew.
    """
    steps: dict[tuple[Any, ...], Step] = {}

    @torch.no_grad()
    def step(token_B1: Tensor, state: State) -> tuple[Tensor, State]:
        layout = _layout(token_B1, state)
        if layout not in steps:
            steps[layout] = _compiled_for(model, token_B1, state)
        return steps[layout](token_B1, state)

    step(token_B1, state)
    return step


def _compiled_for(model: LanguageModel, token_B1: Tensor, state: State) -> Step:
    """The step for tensors of this layout, and for no others: nothing is checked when it is called."""
    from torch._inductor import config

    def stream(token_B1: Tensor, state: State) -> tuple[Tensor, State]:
        return model.stream(token_B1, state)

    # The compiler keeps its results with the code, and at every token looks at modules, tensors and settings to tell them apart, for a seventh of the time of a
    # step. With code of this layout's own it need not.
    own = FunctionType(stream.__code__.replace(), stream.__globals__, closure=stream.__closure__)
    options: Any = {"guard_filter_fn": _no_guards}
    on_cpu, few = token_B1.device.type == "cpu", len(token_B1) <= MAX_ROWS
    compiled: Step = torch.compile(own, dynamic=False, backend=row_backend if on_cpu and few else "inductor", options=options)
    # The integer products are calls, dozens of them a token: from C++ they cost less than from Python. It takes longer to compile.
    from_cpp = on_cpu and few and is_int8(model) and integers_for_few_rows()
    with config.patch(freezing=on_cpu and not few, size_asserts=False, cpp_wrapper=from_cpp):  # looked at when the first call compiles
        compiled(token_B1, state)
    return compiled


def _no_guards(guards: Sequence[object]) -> list[bool]:
    return [False] * len(guards)


def _layout(token_B1: Tensor, state: State) -> tuple[Any, ...]:
    """All that compiled code takes for granted and a caller may change."""
    device = token_B1.device.type
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return *modes, *((each.shape, each.stride(), each.dtype, each.device) for each in (token_B1, *state_tensors(state)))


def graphed_step(step: Step, token_B1: Tensor, state: State) -> Callable[[Tensor], Tensor]:
    """``step`` as a CUDA graph: a call replays it on the next token (B, 1), carries the state, and returns the logits (B, 1, V), in buffers of its own.

    Args:
        step: on a GPU, of one token, whose state keeps its shapes.
        token_B1: any tokens; only the shape counts.
        state: where to start from; it becomes the graph's own and changes with every call.
    """
    token_B1 = token_B1.clone()
    kept = state_tensors(state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(token_B1, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_B1V, after = step(token_B1, state)
        _carry(kept, state_tensors(after))

    return partial(_replay, graph, token_B1, logits_B1V, kept)


def _replay(graph: Any, token_B1: Tensor, logits_B1V: Tensor, kept: list[Tensor], next_B1: Tensor) -> Tensor:
    """``kept`` is the state that the graph reads and writes by its address: nobody else may hold it, and memory that is free is soon another's."""
    token_B1.copy_(next_B1)
    graph.replay()
    return logits_B1V


def _carry(old: list[Tensor], new: list[Tensor]) -> None:
    for before, after in zip(old, new, strict=True):
        if before.data_ptr() != after.data_ptr():  # a cache that is written in place is its own successor
            before.copy_(after)
