"""Where a token reads and where it writes: the keys of a written memory, and of attention in its place.

    s_t = τ K h_t      read:  r_t = SiLU(s_t) / max(‖·‖, 1), or softmax(s_t) over learned slots
                       write: the same of Σ_k u_k ∘ s_{t−k}, whose taps u start as the previous token

A value is thus written under the address of what came before it, so that a token reads what followed its like.

Shapes: B rows, T tokens, D = hidden_size, H heads, S slots (or channels of keys) of all heads, M = S / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import start_std
from gam_lm.mixers.convolution import CausalConv
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.ops.int8_products import int8_product, rounded, widened
from gam_lm.ops.segments import Segments

SHARPNESS = 4.0
"""τ of slots at initialisation: with addresses on the unit sphere, the standard deviation of a score."""

LEAST_LENGTH = 1.0
"""A key that is shorter stays as it is. Nothing comes before the first token of a sequence, whose write key starts as 0: brought to length 1, its gradient would be
without bound, and clipping would leave nothing of the others (docs/log.md). Others are longer, from the start on."""


class Addresses(nn.Module):
    """The part of a memory that knows where; a memory derives from it and adds what is there."""

    address: Tensor
    """K, of all heads (S, D)."""
    address_int8: Tensor
    address_scale: Tensor | None
    """In place of it where it was rounded (`round_address`)."""

    def __init__(self, config: ModelConfig, options: GAMOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.num_heads: int = self.options.num_heads or 1
        self.num_slots: int = self.options.num_memory_slots or config.hidden_size
        self.plain = self.options.write_address != "slots"
        """Whether addresses are plain keys, not distributions over learned slots."""
        self.address = nn.Parameter(torch.empty(self.num_slots, config.hidden_size))
        self.sharpness = None if self.plain else nn.Parameter(torch.empty(self.num_heads))
        self.before = CausalConv(self.num_slots, self.options.conv_kernel_size)
        self.register_buffer("address_int8", None)
        self.register_buffer("address_scale", None)
        self.silent_M: Tensor | None = None
        """Slots of all heads that are taken out (see `Mixer.silence`)."""

    def addresses(self, h_BTD: Tensor, conv_state: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """Where each token reads and where it writes (B, T, H, M): keys of at most length 1, or distributions over the slots.

        Args:
            h_BTD: input of the mixer.
            conv_state: its last K − 1 inputs before h, or None.
            segments: sequences and padding of the rows.
        """
        # The taps see scores, not inputs: the projection is linear, and so one product serves both addresses.
        if conv_state is None:
            read_BTS, before_BJS = self._scores(h_BTD), None
        else:
            J = conv_state.shape[1]
            before_BJS, read_BTS = self._scores(torch.cat([conv_state.to(h_BTD.dtype), h_BTD], 1)).split([J, h_BTD.shape[1]], 1)
        write_BTS, _ = self.before(read_BTS, before_BJS, segments)
        read_BTHM, write_BTHM = (scores_BTS.unflatten(-1, (self.num_heads, -1)) for scores_BTS in (read_BTS, write_BTS))
        if self.plain:
            read_BTHM, write_BTHM = (self._audible(F.silu(keys_BTHM)) for keys_BTHM in (read_BTHM, write_BTHM))
            return F.normalize(read_BTHM, dim=-1, eps=LEAST_LENGTH), F.normalize(write_BTHM, dim=-1, eps=LEAST_LENGTH)
        read_BTHM, write_BTHM = (self._audible(scores_BTHM.softmax(-1), 1) for scores_BTHM in (read_BTHM, write_BTHM))
        return read_BTHM, F.normalize(write_BTHM, dim=-1) if self.options.write == "delta" else write_BTHM

    def _scores(self, h_BTD: Tensor) -> Tensor:
        """τ K h of each token (B, T, S)."""
        if self.address_scale is not None:
            return int8_product(h_BTD, self.address_int8, self.address_scale).to(h_BTD.dtype)
        address_SD: Tensor = self.address
        if self.sharpness is not None:
            address_SD = address_SD * self.sharpness.repeat_interleave(self.num_slots // self.num_heads)[:, None]
        return F.linear(h_BTD, address_SD)

    def address_SD(self) -> Tensor:
        """K (S, D)."""
        return self.address if self.address_scale is None else widened(self.address_int8, self.address_scale)

    def round_address(self) -> None:
        """Keep K in 8 bits, for inference (gam_lm.inference.int8)."""
        levels_SD, scale_S1 = rounded(self.address.detach())
        del self.address
        self.register_buffer("address_int8", levels_SD)
        self.register_buffer("address_scale", scale_S1[:, 0])

    def _audible(self, weight_BTHM: Tensor, total: float | None = None) -> Tensor:
        """The weights without those of silent slots, the others scaled back to ``total``."""
        if self.silent_M is None:
            return weight_BTHM
        weight_BTHM = weight_BTHM * ~self.silent_M.view(weight_BTHM.shape[-2:])
        return weight_BTHM if total is None else total * weight_BTHM / weight_BTHM.sum(-1, keepdim=True).clamp(min=1e-30)

    def shares(self, weight_BTHM: Tensor) -> Tensor:
        """Weights as shares of the slots of all heads (B, T, S): plain keys, which may be negative, by their squares."""
        weight_BTHM = weight_BTHM**2 if self.plain or self.options.write == "delta" else weight_BTHM
        return (weight_BTHM / weight_BTHM.sum(-1, keepdim=True).clamp(min=1e-30) / self.num_heads).flatten(-2)

    def matrices(self) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """See `Mixer.matrices`; the addresses of learned slots are embeddings, plain keys a projection."""
        if self.plain:
            yield self.address, (self.num_slots,)

    def init_addresses(self) -> None:
        """Addresses by ``config.initialization``, those of slots on the unit sphere; the write address starts as the previous token."""
        with torch.no_grad():
            nn.init.normal_(self.address, std=start_std(self.config, self.config.hidden_size))
            if self.sharpness is not None:
                self.address.copy_(F.normalize(self.address, dim=-1))
                self.sharpness.fill_(SHARPNESS)
            self.before.weight.zero_()
            self.before.weight[:, -2] = 1.0
            if self.before.bias is not None:
                self.before.bias.zero_()
