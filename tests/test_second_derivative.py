"""Backward passes that are written out refuse to be differentiated themselves, in place of leaving terms out."""

import pytest
import torch

from gam_lm.ops import context_parallel
from gam_lm.ops.cross_entropy import linear_cross_entropy
from gam_lm.ops.delta_rule import delta_memory
from gam_lm.ops.selective_scan import selective_scan


class OnePiece:
    """The processes of a sequence that lies on one."""

    rank = 0

    def gather(self, own):
        return [own]


def delta(x):
    return delta_memory(x, x, x, x[..., 0].sigmoid(), -x[..., 0].exp(), torch.ones(2, 3, 3))[0]


def scan(x):
    return selective_scan(x[..., 0], x[..., 0].exp(), -torch.ones(2, 2), x[..., 1], x[..., 2])[0]


def loss(x):
    return linear_cross_entropy(x.flatten(0, 2), torch.ones(5, 3), torch.zeros(20, dtype=torch.long))


def fold(x):
    return context_parallel._fold(x[:, :3, 0, :, None] * torch.ones(3), x[:, :3, 1, :, None], OnePiece())


@pytest.mark.parametrize("function", [delta, scan, loss, fold])
def test_a_second_derivative_is_refused(function):
    x = torch.randn(2, 5, 2, 3, requires_grad=True)
    value = function(x).square().sum()
    torch.autograd.grad(value, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="has first derivatives alone: leave create_graph out"):
        torch.autograd.grad(value, x, create_graph=True)
