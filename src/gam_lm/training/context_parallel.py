"""Sequences that one process cannot hold: each process of a group takes a piece of every row. Applied from outside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.model import Backbone
from gam_lm.ops.context_parallel import Pieces, pieces_held


@contextmanager
def context_parallel(model: Backbone, group: Any = None) -> Iterator[None]:
    """Within the block the rows that ``model`` sees are this process's pieces of longer rows; put forward and backward pass inside.

    Every process of the group makes the same calls with as many rows, and at least one token of each. The loss is the mean over the piece's own targets:
    weigh it by their share, and add the gradients of all processes.

    Args:
        model: whose layers are all of mixers that hand a state on.
        group: a torch.distributed process group, the piece being the rank in it; None takes all processes.

    Raises:
        InputError: for a layer that needs all tokens at once, or learned positions.
    """
    if model.config.positions == "learned":
        raise InputError("positions is 'learned': a sequence in pieces needs a model with positions='none'")
    for number, layer in enumerate(model.layers):
        if not layer.mixer.over_pieces:
            name = model.config.layer_mixers[number]
            raise InputError(f"layer {number} is {name!r}, which needs a sequence whole: use gam or gated_deltanet in every layer, or one process a sequence")
    with pieces_held(Pieces(group=dist.group.WORLD if group is None else group)):
        yield


def piece_of(rows_BT: Tensor, group: Any = None) -> Tensor:
    """This process's piece of rows of tokens, targets or segments: cut into parts that differ by one token at most.

    Raises:
        InputError: where a process would be left without a token.
    """
    count, length = dist.get_world_size(group), rows_BT.shape[1]
    pieces = rows_BT.tensor_split(count, 1)
    if length < count:
        raise InputError(f"the rows have {length} tokens for {count} processes: use as many tokens at least")
    return pieces[dist.get_rank(group)]
