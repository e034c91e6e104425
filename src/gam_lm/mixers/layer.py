"""The GAM token mixer as a layer of anybody's PyTorch module: sizes in, no model config.

    layer = GatedAssociativeMemory(hidden_size=256)
    y, state = layer(x)                       x and y are (batch, tokens, 256)
    y_next, state = layer(x_next, state)      the same sequence goes on

It stands where self-attention would stand, behind a norm and beside a residual, and is causal by itself: no mask, no positions.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import MixerState
from gam_lm.mixers.gam import GAMMixer
from gam_lm.mixers.gam_options import GAMOptions


class GatedAssociativeMemory(GAMMixer):
    """A causal convolution and a memory of slots, side by side behind gates: the token mixer of GAM.

    The state is a tuple of tensors, batch first, whose size does not grow with the text (with ``memory="attention"`` or ``"self_attention"`` it does):
    ``layer(x)`` starts a sequence, ``layer(x, state)`` goes on with it, and any split of a sequence into calls gives what one call gives. The initial
    values are drawn from torch's global generator; a layer that was built on the meta device draws them in `reset_parameters` after ``to_empty``.

    Args:
        hidden_size: D, width of input and output.
        num_hidden_layers: layers of the model around it; the output projection starts smaller with depth.
        layer_norm_eps: of the norm inside a written memory.
        device: where the parameters are made; None is torch's default.
        dtype: of the parameters; None is torch's default.
        options: fields of `gam_lm.GAMOptions`: ``write``, ``num_heads``, ``num_memory_slots``, ``conv_kernel_size``, … The defaults are the
            recommended memory; ``**GAMOptions.published().to_dict()`` is the paper's.

    Raises:
        InputError: for an unknown option, or sizes that do not fit together, such as a number of heads that does not divide ``hidden_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_hidden_layers: int = 1,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        config = ModelConfig(
            vocab_size=1, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, layer_norm_eps=layer_norm_eps, options=(GAMOptions(**options),)
        )
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
        """Draw all initial values anew."""
        self.init_weights()

    def extra_repr(self) -> str:
        """The sizes."""
        options = self.options
        what = f"write={options.write!r}" if options.memory == "bank" else f"memory={options.memory!r}"
        return f"hidden_size={self.config.hidden_size}, num_memory_slots={options.num_memory_slots}, {what}, fusion={options.fusion!r}"
