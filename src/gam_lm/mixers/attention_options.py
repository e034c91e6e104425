"""The options of softmax attention (gam_lm.mixers.attention). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gam_lm.errors import InputError, checked
from gam_lm.mixers.options import MixerOptions, Positive, check_heads, default_heads


@checked
class AttentionOptions(MixerOptions):
    """Multi-head causal attention; the defaults are those of the rotary baseline."""

    num_heads: Positive | None = None
    """Heads; by default 4, and more where each would be wider than 64."""
    rotary: bool = True
    """Whether queries and keys are turned by their positions; without it the model needs learned positions to tell order."""
    window: Positive | None = None
    """Tokens that a token sees, itself included: with a window the state does not grow. Where it is not given, all tokens."""
    qk_norm: bool = False
    """Whether queries and keys pass through an RMSNorm per head."""
    conv_kernel_size: Annotated[int, Field(ge=0)] = 0
    """Taps of a causal convolution that is added to queries, keys and values; 0 for none."""
    backend: Literal["auto", "sdpa", "materialised"] = "auto"
    """PyTorch's fused attention (sdpa, and auto), or scores that are held whole, as in the paper's baseline."""

    def resolved(self, hidden_size: int) -> AttentionOptions:
        """See `MixerOptions.resolved`."""
        heads = self.num_heads or default_heads(hidden_size)
        check_heads("num_heads", heads, hidden_size)
        if self.rotary and hidden_size // heads % 2:
            raise InputError(f"num_heads is {heads} with rotary=True, which needs an even width per head and finds {hidden_size // heads}: use other heads")
        return self.replace(num_heads=heads)

    def enlarged(self, ratio: float) -> AttentionOptions:
        """See `MixerOptions.enlarged`."""
        return self.replace(num_heads=max(1, round((self.num_heads or 1) * ratio)))
