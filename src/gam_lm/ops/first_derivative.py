"""What a backward pass that is written out says where it is asked for a second derivative, which would lack terms."""

from __future__ import annotations

import torch


def refuse_second_derivative(what: str, way_out: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated itself (``create_graph=True``).

    PyTorch's ``once_differentiable`` says nothing where the gradient that comes in is a constant, as a loss's own is, nor under ``torch.autograd.grad``.
    A compiled backward pass refuses by itself.

    Args:
        what: the function that is differentiated.
        way_out: what to use in its place.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(f"{what} has first derivatives alone: leave create_graph out, or {way_out}")
