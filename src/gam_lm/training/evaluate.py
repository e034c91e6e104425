"""The validation number: blocks of T + 1 that advance by T, so that every token but the first is predicted once, whatever the batch size.

Shapes: B blocks, T tokens, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gam_lm.data.blocks import Batch, evaluation_blocks
from gam_lm.data.tokens import Split
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE, token_losses
from gam_lm.training.distributed import World
from gam_lm.training.precision import autocast
from gam_lm.training.sharding import give_back, is_sharded


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model makes of a split."""

    block_nats: np.ndarray
    """Sum of the loss over each block, float64 (blocks,)."""
    block_tokens: np.ndarray
    """Predicted tokens of each block, int64 (blocks,)."""
    batch_means: np.ndarray
    """Mean loss of each batch, float64: the paper's protocol averages these."""
    position_nats: np.ndarray
    """Mean loss by place in the block, float64 (context,); the first place has no context."""
    targets: int
    """Tokens of the split that are to be predicted; the paper's protocol leaves some of them out."""
    bytes: int
    """Raw UTF-8 bytes of the split."""
    words: int
    """White-space separated words of the split."""

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy over all predicted tokens."""
        return float(self.block_nats.sum() / self.block_tokens.sum())

    def figures(self, split: str) -> dict[str, float]:
        """The columns of a row of results.json, named after ``split``. What is not predicted counts at the mean of what is, for all bytes and words divide."""
        total = float(self.block_nats.sum()) * (self.targets / int(self.block_tokens.sum()))
        return {
            f"{split}_nats_per_token": self.nats_per_token,
            f"{split}_ppl": math.exp(min(700.0, self.nats_per_token)),
            f"{split}_bits_per_byte": total / math.log(2) / self.bytes,
            f"{split}_word_ppl": math.exp(min(700.0, total / self.words)),
        }


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    split: Split,
    *,
    context: int,
    batch_size: int = 16,
    overlap: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int], None] | None = None,
    world: World | None = None,
) -> Evaluation:
    """Measure ``model`` on a whole split.

    Args:
        model: its training mode is restored afterwards.
        split: the tokens, with the bytes and words of their text.
        context: tokens per block; the context starts anew in each.
        batch_size: blocks at once; of no influence on any figure but ``batch_means``.
        overlap: False is the paper's protocol, blocks that advance by context + 1.
        window: tokens per call of the model, the state carried from call to call; None takes whole blocks. Of no influence on any figure.
        dtype: of the matrix products; float32 computes in the format of the weights.
        advance: called with the number of blocks after each batch.
        world: processes that hold the same model and share the batches; all get all figures.

    Raises:
        InputError: where the split is shorter than one block.
    """
    device = model.embed_tokens.weight.device
    was_training = model.training
    model.eval()
    world = world or World()
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    position_nats, position_counts = np.zeros(context), np.zeros(context, np.int64)
    try:
        blocks = evaluation_blocks(split.ids, context=context, batch_size=batch_size, overlap=overlap, marks=split.marks)
        for number, (tokens, targets, *rest) in _own(blocks, world, even=is_sharded(model)):
            token_BT, target_BT, *several = (torch.from_numpy(part).to(device) for part in (tokens, targets, *rest))
            segments = several[0].split(window or context, 1) if several else [None] * -(-context // (window or context))
            state, losses = None, []
            with autocast(device, dtype):
                pieces = zip(token_BT.split(window or context, 1), target_BT.split(window or context, 1), segments, strict=True)
                for some_BT, wanted_BT, segments_BT in pieces:
                    hidden_BTD, state = model.hidden(some_BT, state, segments_BT)
                    losses.append(token_losses(hidden_BTD.flatten(0, 1), model.lm_head.weight, wanted_BT.flatten()).view_as(wanted_BT))
            if number is None:
                continue
            loss_BT = torch.cat(losses, 1).double().cpu().numpy()
            counted_BT = targets != IGNORE
            found[number] = loss_BT.sum(1), counted_BT.sum(1)
            position_nats += loss_BT.sum(0)
            position_counts += counted_BT.sum(0)
            if advance is not None:
                advance(len(tokens))
    finally:
        model.train(was_training)
        give_back(model)
    shares = world.gather((found, position_nats, position_counts))
    position_nats, position_counts = np.sum([each[1] for each in shares], axis=0), np.sum([each[2] for each in shares], axis=0)
    batches = [batch for _, batch in sorted((number, batch) for each in shares for number, batch in each[0].items())]
    return Evaluation(
        block_nats=np.concatenate([nats for nats, _ in batches]), block_tokens=np.concatenate([counts for _, counts in batches]),
        batch_means=np.array([nats.sum() / counts.sum() for nats, counts in batches]),
        position_nats=position_nats / np.maximum(position_counts, 1), targets=targets_of(split), bytes=split.bytes, words=split.words,
    )  # fmt: skip


def targets_of(split: Split) -> int:
    """How many tokens of a split are to be predicted: all but the first, or those that count."""
    return len(split.ids) - 1 if split.marks is None else int(split.marks.counted.sum())


def _own(blocks: Iterable[Batch], world: World, *, even: bool) -> Iterator[tuple[int | None, Batch]]:
    """This process's batches with their numbers; where all processes need an ``even`` number of forward passes, perhaps one more that has none."""
    last: Batch | None = None
    count = 0
    for count, block in enumerate(blocks, 1):
        last = block
        if (count - 1) % world.size == world.rank:
            yield count - 1, block
    if even and last is not None and 0 < count % world.size <= world.rank:
        yield None, last
