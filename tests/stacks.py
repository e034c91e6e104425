"""Small stacks that tests run over: one of every registered mixer, and two hybrids; any named model on the same small base."""

from gam_lm.config import ModelConfig
from gam_lm.mixers.registry import mixer_names
from gam_lm.presets.models import named_model, on_base

BASE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
    "options": {"gam": {"num_heads": 2, "num_memory_slots": 8, "chunk_size": 8}, "attention": {"num_heads": 2}, "gated_deltanet": {"num_heads": 2}},
}  # fmt: skip

WINDOWED, MIXED = "hybrid", "hybrid-of-all"
"""Three layers of gam to one of attention over a window of 5 tokens, whose state is of constant size; and one layer of every registered mixer."""

HYBRIDS = (WINDOWED, MIXED)
STACKS = (*mixer_names(), *HYBRIDS)


def on(base, **changes):
    """``base`` with other fields; options are added to those that are there."""
    options = {name: {**base["options"].get(name, {}), **each} for name, each in changes.pop("options", {}).items()}
    return {**base, **changes, "options": {**base["options"], **options}}


def stack(name, base=BASE, **changes) -> ModelConfig:
    """The configuration of a stack, a named model, or a pattern of mixers, on ``base``."""
    base = on(base, **changes)
    if name == WINDOWED:
        return named_model("gam-hybrid+num_hidden_layers=4+window=5", base)
    if isinstance(name, tuple):
        return on_base({"mixers": list(name)}, base)
    if name == MIXED:
        return on_base({"mixers": mixer_names(), "num_hidden_layers": len(mixer_names())}, base)
    return named_model(name, base)
