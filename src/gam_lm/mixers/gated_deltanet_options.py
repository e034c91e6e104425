"""The options of Gated DeltaNet (gam_lm.mixers.gated_deltanet). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gam_lm.errors import InputError, checked
from gam_lm.mixers.options import Expansion, MixerOptions, Positive, default_heads


@checked
class GatedDeltaNetOptions(MixerOptions):
    """The defaults are the published proportions (arXiv 2412.06464): keys of 0.75, values of 1.5 times the width, convolutions of 4 taps."""

    num_heads: Positive | None = None
    """Heads; by default 4, and more where the width allows 64 channels for each, as far as keys and values divide into them."""
    expand_k: Expansion = 0.75
    """Width of all queries, and of all keys, over hidden_size."""
    expand_v: Expansion = 1.5
    """Width of all values over hidden_size."""
    conv_kernel_size: Annotated[int, Field(ge=1)] = 4
    """Taps of the short convolutions of queries, keys and values, the current token included."""
    max_write: Annotated[float, Field(gt=0, le=2)] = 1.0
    """The strongest write: 1, or up to 2, which allows negative eigenvalues."""
    chunk_size: Positive = 64
    """Tokens that the rule handles at once: speed and memory only, never the result."""
    backend: Literal["auto", "torch", "fla", "triton"] = "auto"
    """torch, or a kernel for a GPU: flash-linear-attention's, or the library's own (triton), which auto takes on an NVIDIA GPU
    where triton is installed, else torch; a single token that is decoded is then one step in torch."""

    def resolved(self, hidden_size: int) -> GatedDeltaNetOptions:
        """See `MixerOptions.resolved`."""
        channels = {field: round(getattr(self, field) * hidden_size) for field in ("expand_k", "expand_v")}
        most = default_heads(hidden_size)
        heads = self.num_heads or next((n for n in range(most, 1, -1) if all(n <= each and each % n == 0 for each in channels.values())), 1)
        for field, each in channels.items():
            if each < heads or each % heads:
                raise InputError(f"{field} is {getattr(self, field)}, which gives {each} channels for num_heads={heads}: use a multiple of the heads")
        return self.replace(num_heads=heads)

    def enlarged(self, ratio: float) -> GatedDeltaNetOptions:
        """See `MixerOptions.enlarged`."""
        return self.replace(num_heads=max(1, round((self.num_heads or 1) * ratio)))
