"""Decoding with GPT-2 of transformers, for `gam bench-decode`.

Shapes: B rows, H heads, E channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from gam_lm.hf.modeling_gam import CACHE


def gpt2_decoding(model: Any, tokens: int, batch_size: int) -> tuple[Callable[[], object], int]:
    """Decode with a cache of ``tokens`` tokens, filled at random: a call decodes one more token of every row.

    Returns:
        The call, and the bytes of one sequence's cache before the first one.
    """
    weight = model.transformer.wte.weight
    cache = DynamicCache(config=model.config)
    shape = (batch_size, model.config.n_head, tokens, model.config.n_embd // model.config.n_head)
    for layer in range(model.config.n_layer):
        keys, values = (torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    token_B1 = torch.zeros(batch_size, 1, dtype=torch.long, device=weight.device)

    def step() -> None:
        nonlocal token_B1
        outputs = model(input_ids=token_B1, use_cache=True, **{CACHE: cache})
        token_B1 = outputs.logits[:, -1].argmax(-1, keepdim=True)

    return step, 2 * model.config.n_layer * keys[0].nbytes
