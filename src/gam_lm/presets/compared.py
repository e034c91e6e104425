"""What each command compares where no models are named. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPARED = ("gam", "llama", "mamba")
"""Of `gam bench` and `gam tune`."""

TRAINED = ("gam-static", "gam", "gam-mean", "gam-slots", "transformer", "mamba")
"""Of `gam bench-train`."""

DECODED = ("gam-static", "gam", "gam-mean", "gam-slots", "gam-hybrid", "transformer", "mamba", "hf:gpt2")
"""Of `gam bench-decode`; hf:gpt2 is Transformers' own with its cache."""

ON_GPU = ("gam", "llama", "mamba", "gam-static", "gam+backend=torch", "gam-mean", "gated-deltanet")
"""Of `gam bench-gpu`; backends that are not named are a GPU's own: Triton kernels, and for llama PyTorch's fused attention."""

BLOCKS_ON_GPU = (*ON_GPU, "gam+backend=fla", "gated-deltanet+backend=fla", "mamba+backend=torch")
"""Of its comparison of blocks."""

DRY = ("gam-static", "gam", "transformer", "mamba")
"""Of its dry run."""

DRY_BASE: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32, "options": {"gam": {"num_heads": 2, "num_memory_slots": 8}},
}  # fmt: skip
"""The fields that the models of the dry run share."""

DISTRIBUTED = ("gam", "gated-deltanet")
"""What `gam bench-distributed` runs on several processes."""

DISTRIBUTED_TINY: Mapping[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "options": {"gam": {"num_heads": 2}, "gated_deltanet": {"num_heads": 2}},
}  # fmt: skip
"""The base of its runs that are compared."""

DISTRIBUTED_SMALL: Mapping[str, Any] = {
    "vocab_size": 512, "hidden_size": 192, "num_hidden_layers": 3, "options": {"gam": {"num_heads": 3}, "gated_deltanet": {"num_heads": 3}},
}  # fmt: skip
"""The base of its runs that are timed."""

DISTRIBUTED_WIDE: Mapping[str, Any] = {
    "vocab_size": 4096, "hidden_size": 384, "num_hidden_layers": 8, "options": {"gam": {"num_heads": 6}, "gated_deltanet": {"num_heads": 6}},
}  # fmt: skip
"""The base of its steps whose memory is measured: large enough that the libraries do not matter."""

DISTRIBUTED_LONG: Mapping[str, Any] = {
    "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "options": {"gam": {"num_heads": 1}, "gated_deltanet": {"num_heads": 1}},
}  # fmt: skip
"""The base of its long sequence."""
