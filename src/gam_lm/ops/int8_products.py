"""Numbers rounded to 8 bits, and products with matrices of such.

    W ≈ scale ∘ Q,   scale_o = max_i |W_oi| / 127,   Q = round(W / scale)

A processor with instructions for 8-bit products rounds what it multiplies alike, row by row, and multiplies integers; elsewhere, and in a compiled step of few
rows where a matrix unit would have them, a product widens its matrix as it goes.

Shapes: R rows, I inputs, O outputs; … any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gam_lm.ops import number_formats
from gam_lm.ops.row_products import MAX_ROWS, row_product

LEVELS = 127


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of (…, I) as integers and the scale that they are multiplied with: (…, I) in int8, (…, 1) as ``x``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / LEVELS
    # In fp32 and cut off: by a scale that bf16 rounded down, the largest number comes to 128, which 8 bits would turn into −128.
    levels = (x.float() / scale.float()).round().clamp(-LEVELS, LEVELS)
    return levels.to(torch.int8), scale


def widened(levels_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The matrix that integers and a scale for each row stand for (O, I)."""
    return levels_OI.to(scale_O.dtype) * scale_O[:, None]


def int8_product(x: Tensor, levels_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x Wᵀ for the matrix W that integers and a scale for each row stand for: (…, I) to (…, O)."""
    return _product(x.reshape(-1, x.shape[-1]), levels_OI).view(*x.shape[:-1], len(scale_O)) * scale_O


def _product(x_RI: Tensor, levels_OI: Tensor) -> Tensor:
    """x Qᵀ (R, O). A graph that leaves for another machine keeps the plain form."""
    here = x_RI.device.type == "cpu" and not torch.compiler.is_exporting()
    loop = here and torch.compiler.is_compiling() and len(x_RI) <= MAX_ROWS
    integers = integers_for_few_rows() if loop else number_formats.CPU_HAS_INT8
    if here and integers and len(x_RI) and x_RI.shape[1] > 1:  # of matrices of one column PyTorch 2.13 gives wrong products
        levels_RI, scale_R1 = rounded(x_RI.float())
        return torch._int_mm(levels_RI, levels_OI.T) * scale_R1
    if loop:
        return row_product(x_RI, levels_OI.T)  # a loop that widens each number once
    return F.linear(x_RI, levels_OI.to(x_RI.dtype))


def integers_for_few_rows() -> bool:
    """Whether a compiled step of up to `MAX_ROWS` rows multiplies integers here."""
    return number_formats.CPU_HAS_INT8 and not number_formats.CPU_HAS_INT8_TILES
