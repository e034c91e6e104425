"""The options of a baseline from transformers (gam_lm.hf.baselines). Imports neither torch nor transformers."""

from __future__ import annotations

from gam_lm.errors import checked
from gam_lm.mixers.options import MixerOptions, Positive, check_heads, default_heads


@checked
class BaselineOptions(MixerOptions):
    """Sizes that a model type of transformers takes as far as it knows them."""

    num_heads: Positive | None = None
    """Heads of its attention; by default 4, and more where each would be wider than 64."""
    state_size: Positive = 16
    """States of a state space."""
    chunk_size: Positive = 64
    """Tokens that a recurrence handles at once."""

    def resolved(self, hidden_size: int) -> BaselineOptions:
        """See `MixerOptions.resolved`."""
        heads = self.num_heads or default_heads(hidden_size)
        check_heads("num_heads", heads, hidden_size)
        return self.replace(num_heads=heads)
