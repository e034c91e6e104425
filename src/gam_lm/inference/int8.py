"""int8: the matrices of Linear layers and embeddings as 8-bit integers with one scale per row.

    W ≈ scale ∘ Q,   scale_o = max_i |W_oi| / 127,   Q = round(W / scale)

A quarter of the bytes of fp32 on the disk and in memory. A processor with instructions for 8-bit products rounds what it multiplies alike, row by row, and
multiplies integers; elsewhere a product widens its matrix as it goes. The memory's bank, addresses, convolutions and norms stay as they are: they are few
numbers, and softmax scores are what rounding hurts most.

Shapes: O rows, I columns of a matrix; R rows of what it is multiplied with; … any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.errors import unknown_name
from gam_lm.inference.row_products import MAX_ROWS, row_product
from gam_lm.ops import number_formats

METHOD = "gam_int8"
"""``quant_method`` in the ``quantization_config`` of a config.json."""

LEVELS = 127


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of (…, I) as integers and the scale that they are multiplied with: (…, I) in int8, (…, 1) as ``x``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / LEVELS
    # In fp32 and cut off: by a scale that bf16 rounded down, the largest number comes to 128, which 8 bits would turn into −128.
    levels = (x.float() / scale.float()).round().clamp(-LEVELS, LEVELS)
    return levels.to(torch.int8), scale


class _Int8(nn.Module):
    """A matrix in 8 bits."""

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        levels_OI, scale_O1 = rounded(weight_OI.detach())
        self.register_buffer("weight_int8", levels_OI)
        self.register_buffer("weight_scale", scale_O1[:, 0])

    @property
    def weight(self) -> Tensor:
        """The matrix that the integers stand for (O, I), made anew at every look."""
        return self.weight_int8.to(self.weight_scale.dtype) * self.weight_scale[:, None]


class Int8Linear(_Int8):
    """A Linear layer with its matrix in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias: (…, I) to (…, O)."""
        y = self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(self.weight_scale)) * self.weight_scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _product(self, x_RI: Tensor) -> Tensor:
        """x Qᵀ (R, O). A graph that leaves for another machine keeps the plain form."""
        here = x_RI.device.type == "cpu" and not torch.compiler.is_exporting()
        if here and number_formats.CPU_HAS_INT8 and len(x_RI) and x_RI.shape[1] > 1:  # of matrices of one column PyTorch 2.13 gives wrong products
            levels_RI, scale_R1 = rounded(x_RI.float())
            return torch._int_mm(levels_RI, self.weight_int8.T) * scale_R1
        if here and torch.compiler.is_compiling() and len(x_RI) <= MAX_ROWS:
            return row_product(x_RI, self.weight_int8.T)  # a loop that widens each number once
        return F.linear(x_RI, self.weight_int8.to(x_RI.dtype))


class Int8Embedding(_Int8):
    """An embedding with its matrix in 8 bits."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: (…) to (…, I)."""
        return self.weight_int8[ids].to(self.weight_scale.dtype) * self.weight_scale[ids][..., None]


def quantize_int8(model: nn.Module) -> None:
    """Replace every Linear layer and embedding of ``model``, in place. A matrix that two of them share stays shared. For inference only."""
    made: dict[int, _Int8] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear | nn.Embedding):
                continue
            weight = child.weight
            new = Int8Linear(child) if isinstance(child, nn.Linear) else Int8Embedding(child)
            if (first := made.setdefault(id(weight), new)) is not new:
                new.weight_int8, new.weight_scale = first.weight_int8, first.weight_scale
            setattr(parent, name, new)
    model.eval()


def is_int8(model: nn.Module) -> bool:
    """Whether `quantize_int8` was here."""
    return any(isinstance(part, _Int8) for part in model.modules())


def quantization_config() -> dict[str, object]:
    """What a config.json says of such a model."""
    return {"quant_method": METHOD, "bits": 8}


def check_method(config: dict[str, object]) -> None:
    """Raise InputError for a ``quantization_config`` of another making."""
    if config.get("quant_method") != METHOD:
        raise unknown_name("quant_method", str(config.get("quant_method")), [METHOD])
