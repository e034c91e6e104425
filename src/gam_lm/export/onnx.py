"""Graphs as ONNX, for runtimes without PyTorch.

Shapes: X leading dimensions, L rows and columns of a triangular matrix.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from gam_lm.errors import InputError, MissingExtraError
from gam_lm.export.graphs import Graphs
from gam_lm.export.operators import OPERATOR

LINEAR_ATTENTION = OPERATOR.rpartition(":")[2]
"""The operator that older runtimes lack."""

NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
"""Loggers that say a line for every pass over the graph."""


def write_onnx(graphs: Graphs, directory: Path) -> None:
    """Write the portable graphs as prefill.onnx and step.onnx; arguments and errors as of `write_program`."""
    for name, program in (("prefill", graphs.prefill), ("step", graphs.step)):
        write_program(program, graphs.state_names, directory / f"{name}.onnx")


def write_program(program: ExportedProgram, state_names: Sequence[str], path: Path) -> None:
    """Write a graph, weights inside, with inputs tokens, state… and outputs logits, state….

    The outputs of the state are named ``new_`` and the input they become; free dimensions are batch, tokens and cached.

    Raises:
        MissingExtraError: where onnx or onnxscript is not installed.
    """
    try:
        import onnx as _onnx
        import onnxscript as _onnxscript
    except ImportError as error:
        raise MissingExtraError("onnx and onnxscript", "export", "format 'onnx'") from error
    del _onnx, _onnxscript
    with _quietly():
        converted: Any = torch.onnx.export(
            program.run_decompositions({torch.ops.aten.linalg_solve_triangular.default: _solve_unit_lower}), dynamo=True, verbose=False,
            input_names=["tokens", *state_names], output_names=["logits", *(f"new_{each}" for each in state_names)],
        )  # fmt: skip
        _tidy(converted.model.graph)
        converted.save(path)


def _tidy(graph: Any) -> None:
    """Name the free dimensions, and leave out where in somebody's source each node comes from."""
    rows, tokens = (str(size) for size in graph.inputs[0].shape)
    names = {rows: "batch", tokens: "tokens"}
    for value in graph.inputs[1:]:
        names |= {str(size): "cached" for size in value.shape if not isinstance(size, int) and str(size) != rows}
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = type(value.shape)([
                size if isinstance(size, int) else re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size.value)) for size in value.shape
            ])


class OnnxGraph:
    """A graph in ONNX Runtime, called as the traced program is.

    Raises:
        MissingExtraError: where onnxruntime is not installed.
        InputError: where this onnxruntime does not have the operators of the graph.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export", "format 'onnx'") from error
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own, which has many names
            if LINEAR_ATTENTION not in str(error):
                raise
            raise InputError(
                f"onnxruntime {onnxruntime.__version__} has no operator {LINEAR_ATTENTION}: update it, or give --portable for graphs without it"
            ) from error

    def __call__(self, tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits and the new state."""
        values = [tokens, *state]
        feeds = {each.name: value.cpu().numpy() for each, value in zip(self.session.get_inputs(), values, strict=True)}
        logits, *new = (torch.from_numpy(np.asarray(value)) for value in self.session.run(None, feeds))
        return logits, new


def _solve_unit_lower(A_XLL: Tensor, B_XLN: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """A⁻¹ B for a unit lower triangular A by products alone, as ONNX has no substitution.

    The inverse of [[P, 0], [C, Q]] is [[P⁻¹, 0], [−Q⁻¹ C P⁻¹, Q⁻¹]]: from blocks of size 1 on, log2 L times, all blocks of a size at once.
    """
    if upper or not left or not unitriangular:
        return NotImplemented
    L = A_XLL.shape[-1]
    size = 1 << (L - 1).bit_length()
    A_XSS = F.pad(A_XLL, (0, size - L, 0, size - L))
    flat = A_XSS.flatten(-2)
    inverse = flat.new_ones(()).expand(*flat.shape[:-1], size, 1, 1)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        start = torch.arange(pairs)[:, None, None] * 2 * width
        place = (start + width + torch.arange(width)[:, None]) * size + start + torch.arange(width)
        C = flat.index_select(-1, place.flatten().to(flat.device)).unflatten(-1, (pairs, width, width))
        P, Q = inverse.unflatten(-3, (pairs, 2)).unbind(-3)
        inverse = torch.cat([torch.cat([P, torch.zeros_like(P)], -1), torch.cat([-(Q @ C @ P), Q], -1)], -2)
        width *= 2
    return inverse[..., 0, :L, :L] @ B_XLN


class _quietly(warnings.catch_warnings):
    """Without the exporter's remarks on packages it looks for, on its passes and on its own internals."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self._levels = {name: logging.getLogger(name).level for name in NOISY}
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        return entered

    def __exit__(self, *error: Any) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        super().__exit__(*error)
