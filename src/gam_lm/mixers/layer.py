"""The GAM token mixer as a layer of anybody's PyTorch module: sizes in, no model config.

    layer = GatedAssociativeMemory(hidden_size=256)
    y, state = layer(x)                       x and y are (batch, tokens, 256)
    y_next, state = layer(x_next, state)      the same sequence goes on

It stands where self-attention would stand, behind a norm and beside a residual, and is causal by itself: no mask, no positions.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import MixerState
from gam_lm.mixers.gam import GAMMixer


class GatedAssociativeMemory(GAMMixer):
    """A causal convolution and a memory of slots, side by side behind gates: the token mixer of GAM.

    The state is a tuple of tensors, batch first, whose size does not grow with the text: ``layer(x)`` starts a sequence, ``layer(x, state)`` goes on
    with it, and any split of a sequence into calls gives what one call gives. The start values are drawn from torch's global generator; a layer
    that was built on the meta device draws them in :meth:`reset_parameters` after ``to_empty``.

    Args:
        hidden_size: D, width of input and output.
        num_memory_slots: slots of the memory in total; a written memory divides them over its heads.
        conv_kernel_size: tokens that the convolution sees, the current one included.
        write: "none" is the paper's static memory, which moves nothing between tokens; "mean" and "delta" let the sequence write into it
            (gam_lm.ops.mean_rule), so that a token can read what stood anywhere before.
        num_attention_heads: heads of a written memory.
        fusion: "gate" (the paper), "sum", or one path alone, "global" or "local".
        gate_activation: "sigmoid" (the paper), or "silu", with which the mean memory models language better (docs/memory.md).
        static_path: whether the paper's static memory stands beside a written one.
        chunk_size: tokens that a written memory handles at once: speed and memory only, never the result.
        num_hidden_layers: layers of the model around it; the output of a written memory starts smaller with depth.
        layer_norm_eps: of the norms inside a written memory.
        backend: "auto", "torch", or "fla" (flash-linear-attention, delta on a GPU).
        device: where the parameters are made; None is torch's default.
        dtype: of the parameters; None is torch's default.

    Raises:
        InputError: for sizes that do not fit together, such as a number of heads that does not divide ``hidden_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_memory_slots: int = 512,
        conv_kernel_size: int = 3,
        write: Literal["none", "mean", "delta"] = "none",
        num_attention_heads: int = 8,
        fusion: Literal["gate", "sum", "global", "local"] = "gate",
        gate_activation: Literal["sigmoid", "silu"] = "sigmoid",
        static_path: bool = False,
        chunk_size: int = 64,
        num_hidden_layers: int = 1,
        layer_norm_eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = ModelConfig(
            vocab_size=1, hidden_size=hidden_size, num_memory_slots=num_memory_slots, conv_kernel_size=conv_kernel_size, write=write,
            num_attention_heads=num_attention_heads, fusion=fusion, gate_activation=gate_activation, static_path=static_path, chunk_size=chunk_size,
            num_hidden_layers=num_hidden_layers, layer_norm_eps=layer_norm_eps, backend=backend,
        )  # fmt: skip
        with nullcontext() if device is None else torch.device(device):
            super().__init__(config)
        if dtype is not None:
            self.to(dtype)
        if not next(self.parameters()).is_meta:
            self.reset_parameters()

    def forward(self, x_BTD: Tensor, state: MixerState | None = None, *, segments_BT: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """Mix the tokens of each row, causally.

        Args:
            x_BTD: input, normalised as a rule.
            state: what the last call returned for the tokens before x; None starts the sequences.
            segments_BT: integers that tell the sequences of a row apart, 0 for padding; an attention mask of 0 and 1 is one. Padding, on either
                side, changes nothing for the others.

        Returns:
            The output (B, T, D), to be added to the residual stream, and the state after the last token.
        """
        return super().forward(x_BTD, state, segments_BT=segments_BT)

    def reset_parameters(self) -> None:
        """Draw all start values anew."""
        self.init_weights()

    def extra_repr(self) -> str:
        """The sizes."""
        config = self.config
        return f"hidden_size={config.hidden_size}, num_memory_slots={config.num_memory_slots}, write={config.write!r}, fusion={config.fusion!r}"
