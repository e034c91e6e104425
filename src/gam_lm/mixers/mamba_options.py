"""The options of Mamba's mixer (gam_lm.mixers.mamba). Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from gam_lm.errors import InputError, checked
from gam_lm.mixers.options import Expansion, MixerOptions, Positive


@checked
class MambaOptions(MixerOptions):
    """The defaults are the published ones (arXiv 2312.00752)."""

    feed_forward: ClassVar[bool] = False
    expansion: ClassVar[str | None] = "expand"

    state_size: Positive = 16
    """States per channel."""
    expand: Expansion = 2.0
    """Inner channels over hidden_size."""
    conv_kernel_size: Positive = 4
    """Taps of the short causal convolution, the current token included."""
    chunk_size: Positive = 64
    """Tokens that the scan handles at once: speed and memory only, never the result."""
    backend: Literal["auto", "torch", "triton", "numba"] = "auto"
    """auto takes the kernels of triton on an NVIDIA GPU where triton is installed, those of numba on a CPU where numba is, else torch. A single token is one
    step in torch whatever is named."""

    def resolved(self, hidden_size: int) -> MambaOptions:
        """See `MixerOptions.resolved`."""
        if round(self.expand * hidden_size) < 1:
            raise InputError(f"expand is {self.expand}: use a number that leaves at least one of {hidden_size} channels")
        return self
