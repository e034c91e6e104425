"""Products of a few rows with a matrix, which are all that decoding does, through PyTorch's compiler on a CPU.

A token costs what its weights take to read. The libraries' products are made for many rows: with one, they read bf16 weights at half the rate or less of
a plain loop over them. Here such a product is written as multiply and sum, which the compiler turns into that loop, together with what comes after it.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

MAX_ROWS = 3
"""From some more rows on the libraries are quicker."""


def row_backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of torch.compile for inference on a CPU: inductor, with the products of at most `MAX_ROWS` rows as loops over the weights."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    aten, usual = torch.ops.aten, select_decomp_table()

    def mm(x_RI: Tensor, weight_IO: Tensor) -> Any:
        if len(x_RI) > MAX_ROWS or not x_RI.is_floating_point():
            return usual[aten.mm.default](x_RI, weight_IO)
        return row_product(x_RI, weight_IO).to(x_RI.dtype)

    def addmm(bias_O: Tensor, x_RI: Tensor, weight_IO: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        if len(x_RI) > MAX_ROWS or not x_RI.is_floating_point() or (beta, alpha) != (1, 1):
            return usual[aten.addmm.default](bias_O, x_RI, weight_IO, beta=beta, alpha=alpha)
        return (row_product(x_RI, weight_IO) + bias_O).to(x_RI.dtype)

    compiled: Any = compile_fx(graph, inputs, decompositions={**usual, aten.mm.default: mm, aten.addmm.default: addmm})
    return compiled


def row_product(x_RI: Tensor, weight_IO: Tensor) -> Tensor:
    """x W (R, O) in fp32 or wider, as sums; for a step that is being compiled."""
    # The compiler would compute what makes x (a GELU, say) anew for each of the O sums; asked for a layout, it computes x first.
    x_RI = torch.ops.prims.inductor_force_stride_order.default(x_RI, [x_RI.shape[1], 1])
    wide = torch.promote_types(x_RI.dtype, torch.float32)
    weight_OI = weight_IO.T.to(wide)
    return torch.stack([(weight_OI * x_I.to(wide)).sum(-1) for x_I in x_RI.unbind()])
