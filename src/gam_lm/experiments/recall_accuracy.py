"""The share of right answers of a model on a task of gam_lm.experiments.recall_tasks, on sequences that it has not seen.

Shapes: B sequences, T tokens, N answers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from gam_lm.experiments.models import activations_per_token
from gam_lm.experiments.recall_tasks import RecallTask
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE

TEST_SEQUENCES, TUNING_SEQUENCES = 20_000, 30_000
"""Seeds of the sequences that models are tested on, and of those that decide between trials."""

TEST_BATCH = 128
TEST_TOKENS = 2**20
"""The most tokens that are drawn at once for a test."""
MODEL_TOKENS = 2**17
"""The most tokens that go through the model at once in a test, so that long sequences fit."""
MODEL_NUMBERS = 2**29
"""The most numbers that a layer may hold for them."""


@torch.no_grad()
def accuracy(model: LanguageModel, task: RecallTask, *, sequences: int = 1024, seed: int = TEST_SEQUENCES) -> dict[str, Any]:
    """Share of right answers on fresh sequences, in all and by gap.

    Args:
        model: its training mode is restored afterwards.
        task: what is asked.
        sequences: how many.
        seed: of the sequences.

    Returns:
        ``accuracy``, and ``by_gap``: answers and accuracy for gaps in [2^k, 2^(k+1)).
    """
    device = model.embed_tokens.weight.device
    was_training = model.training
    model.eval()
    generator = np.random.default_rng([seed, 2])
    right, gaps = [], []
    held = max(1.0, activations_per_token(model.config, task.length))
    batch = min(TEST_BATCH, max(1, TEST_TOKENS // task.length))
    for start in range(0, sequences, batch):
        tokens, targets, gap = task.sample(min(batch, sequences - start), generator)
        asked = targets != IGNORE
        few = max(1, int(min(MODEL_TOKENS, MODEL_NUMBERS / held)) // task.length)
        for i in range(0, len(tokens), few):
            hidden_BTD, _ = model.hidden(torch.from_numpy(tokens[i : i + few]).to(device))
            answers_N = model.lm_head(hidden_BTD[torch.from_numpy(asked[i : i + few]).to(device)]).argmax(-1).cpu().numpy()
            right.append(answers_N == targets[i : i + few][asked[i : i + few]])
        gaps.append(gap[asked])
    model.train(was_training)
    right_N, gap_N = np.concatenate(right), np.concatenate(gaps)
    by_gap = []
    for k in range(int(math.log2(gap_N.max())) + 1):
        within = (gap_N >= 2**k) & (gap_N < 2 ** (k + 1))
        if within.any():
            by_gap.append({"gap_from": 2**k, "answers": int(within.sum()), "accuracy": float(right_N[within].mean())})
    return {"accuracy": float(right_N.mean()), "answers": len(right_N), "by_gap": by_gap}
