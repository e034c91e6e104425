"""int8: the matrices of Linear layers and embeddings, and the keys of a written memory, as 8-bit integers with one scale per row.

A quarter of the bytes of fp32 on the disk and in memory (gam_lm.ops.int8_products multiplies). The memory's bank, the addresses of learned slots, convolutions
and norms stay as they are: they are few numbers, and softmax scores are what rounding hurts most.

Shapes: O rows, I columns of a matrix; … any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gam_lm.errors import InputError, unknown_name
from gam_lm.mixers.addresses import Addresses
from gam_lm.ops.int8_products import int8_product, rounded, widened

METHOD = "gam_int8"
"""``quant_method`` in the ``quantization_config`` of a config.json."""


class _Int8(nn.Module):
    """A matrix in 8 bits."""

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        levels_OI, scale_O1 = rounded(weight_OI.detach())
        self.register_buffer("weight_int8", levels_OI)
        self.register_buffer("weight_scale", scale_O1[:, 0])
        self.first: tuple[_Int8, ...] = ()
        """The layer whose matrix this one shares, in a tuple, which makes it no part of this one."""

    def share(self, first: _Int8) -> None:
        """Have the matrix of ``first``, now and after both have moved."""
        self.first = (first,)
        self.weight_int8, self.weight_scale = first.weight_int8, first.weight_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # moves every buffer on its own
        for first in self.first:
            alike = ((a.device, a.dtype) == (b.device, b.dtype) for a, b in ((self.weight_int8, first.weight_int8), (self.weight_scale, first.weight_scale)))
            if all(alike):
                self.share(first)
        return self

    @property
    def weight(self) -> Tensor:
        """The matrix that the integers stand for (O, I), made anew at every look."""
        return widened(self.weight_int8, self.weight_scale)


class Int8Linear(_Int8):
    """A Linear layer with its matrix in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias: (…, I) to (…, O)."""
        y = int8_product(x, self.weight_int8, self.weight_scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Embedding(_Int8):
    """An embedding with its matrix in 8 bits."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: (…) to (…, I)."""
        return self.weight_int8[ids].to(self.weight_scale.dtype) * self.weight_scale[ids][..., None]


def quantize_int8(model: nn.Module) -> None:
    """Round every Linear layer, embedding and key matrix of ``model``, in place. A matrix that two layers share stays shared. For inference only."""
    made: dict[int, _Int8] = {}
    for parent in list(model.modules()):
        if isinstance(parent, Addresses) and parent.plain:
            parent.round_address()
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear | nn.Embedding):
                continue
            weight = child.weight
            new = Int8Linear(child) if isinstance(child, nn.Linear) else Int8Embedding(child)
            if (first := made.setdefault(id(weight), new)) is not new:
                new.share(first)
            setattr(parent, name, new)
    model.eval()


def is_int8(model: nn.Module) -> bool:
    """Whether `quantize_int8` was here."""
    return any(isinstance(part, _Int8) for part in model.modules())


def quantization_config() -> dict[str, object]:
    """What a config.json says of such a model."""
    return {"quant_method": METHOD, "bits": 8}


def check_method(config: object) -> None:
    """Raise InputError for a ``quantization_config`` of another making."""
    if not isinstance(config, Mapping):
        raise InputError(f"quantization_config is {config!r}, which is no object: copy config.json again, or export the run anew")
    if config.get("quant_method") != METHOD:
        raise unknown_name("quant_method", str(config.get("quant_method")), [METHOD])
