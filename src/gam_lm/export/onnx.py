"""The two graphs as ONNX, for runtimes without PyTorch.

Shapes: X leading dimensions, L rows and columns of a triangular matrix.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gam_lm.errors import MissingExtraError
from gam_lm.export.graphs import Graphs


def write_onnx(graphs: Graphs, directory: Path) -> None:
    """Write prefill.onnx and step.onnx, weights inside, with inputs tokens, state… and outputs logits, state….

    The outputs of the state are named ``new_`` and the input they become.

    Raises:
        MissingExtraError: where onnx or onnxscript is not installed.
    """
    try:
        import onnx as _onnx
        import onnxscript as _onnxscript
    except ImportError as error:
        raise MissingExtraError("onnx and onnxscript", "export", "format 'onnx'") from error
    del _onnx, _onnxscript
    for name, program in (("prefill", graphs.prefill), ("step", graphs.step)):
        with _quietly():
            converted = torch.onnx.export(
                program.run_decompositions({torch.ops.aten.linalg_solve_triangular.default: _solve_unit_lower}), dynamo=True, verbose=False,
                input_names=["tokens", *graphs.state_names], output_names=["logits", *(f"new_{each}" for each in graphs.state_names)],
            )  # fmt: skip
        assert converted is not None
        converted.save(directory / f"{name}.onnx")


class OnnxGraph:
    """A graph in ONNX Runtime, called as the traced program is.

    Raises:
        MissingExtraError: where onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export", "format 'onnx'") from error
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

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
    """Without the exporter's remarks on packages it looks for and on its own internals."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return entered

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("torch.onnx").setLevel(self._level)
        super().__exit__(*error)
