"""A sequence in pieces on several processes against the same sequence on one: outputs, loss and every gradient, in fp64."""

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from stacks import stack

from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.ops.context_parallel import Pieces, _Mean
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.ops.mean_rule import mean_memory, naive_mean_memory
from gam_lm.training.context_parallel import context_parallel, piece_of

MODELS = ("gam", "gam-mean", "gam-slots", "gated_deltanet")

# Segments by row (None is one sequence), and the places of the cuts. Kernels have 4 taps.
TWO = {
    "in mid-sequence": (None, 40, [19]),
    "between chunks": (None, 32, [16]),
    "on a boundary": ([[1] * 15 + [2] * 25, [3] * 40], 40, [15]),
    "a boundary one token after the cut": ([[1] * 16 + [2] * 24, [1] * 14 + [2] * 26], 40, [15]),
    "a piece shorter than the kernel": (None, 20, [18]),
    "a first piece of one token": (None, 20, [1]),
    "padding at the cut": ([[1] * 13 + [0] * 4 + [1] * 23, [0] * 20 + [5] * 20], 40, [15]),
    "the same id after the cut is the same sequence": ([[7] * 40, [1] * 10 + [7] * 30], 40, [20]),
}
FOUR = {
    "one long sequence": (None, 64, [16, 32, 48]),
    "pieces shorter than the kernel": (None, 40, [20, 21, 23]),
    "one token each": (None, 4, [1, 2, 3]),
    "mixed": ([[1] * 5 + [2] * 30 + [0] * 3 + [3] * 26, [1] * 16 + [2] * 16 + [3] * 32], 64, [16, 32, 48]),
    "many short sequences": ([[1 + i // 3 for i in range(48)], [1 + i // 7 for i in range(48)]], 48, [12, 24, 36]),
    "sequences of length 1": ([[1 + i for i in range(16)], [1 + i % 2 for i in range(16)]], 16, [4, 8, 12]),
    "a piece of padding alone": ([[1] * 8 + [0] * 10 + [1] * 14, [1] * 6 + [0] * 12 + [2] * 14], 32, [8, 16, 24]),
}


class Piece:
    """A piece whose others have said already what they hold."""

    def __init__(self, rank, before):
        self.rank, self.before = rank, before

    def gather(self, own):
        self.own = own
        return [*self.before, own]


@pytest.mark.parametrize("least", [-1e3, -1e30, -torch.inf])
def test_a_token_that_forgets_everything_costs_the_pieces_of_a_mean_no_precision(least):
    torch.manual_seed(0)
    read, write = torch.rand(2, 24, 2, 3), torch.rand(2, 24, 2, 3)
    decay = -0.1 * torch.rand(2, 24, 2)
    decay[:, [5, 13]] = least
    rows = (read, write, torch.randn(2, 24, 2, 4), torch.rand(2, 24, 2), decay)
    bank = (torch.randn(2, 3, 4), torch.ones(2, 3))
    expected, _ = naive_mean_memory(*(each.double() for each in (*rows, *bank)))
    found, before = [], []
    for rank in range(3):
        piece = Piece(rank, before)
        own = (each[:, 8 * rank : 8 * rank + 8] for each in rows)
        found.append(_Mean(mean_memory, piece)(*own, *bank, chunk_size=4)[0])
        before = [*before, piece.own]
    torch.testing.assert_close(torch.cat(found, 1).double(), expected, rtol=1e-5, atol=1e-5)


def model_of(name):
    torch.manual_seed(0)
    model = LanguageModel(stack(name)).double()
    with torch.no_grad():  # every path matters, also those that start at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows_of(segments, length):
    torch.manual_seed(1)
    tokens_BT, targets_BT = torch.randint(0, 40, (2, 2, length))
    targets_BT[:, 2] = IGNORE
    if segments is None:
        return tokens_BT, targets_BT, None
    segments_BT = torch.tensor(segments)
    return tokens_BT, targets_BT.where(segments_BT != 0, IGNORE), segments_BT


def outputs_and_gradients(model, tokens_BT, targets_BT, segments_BT, share=1.0):
    logits_BTV, loss = model(tokens_BT, targets_BT, segments=segments_BT)
    (loss * share).backward()
    return logits_BTV.detach(), loss.detach() * share, [parameter.grad for parameter in model.parameters()]


def compare(rank, name, cases):
    for segments, length, cuts in cases.values():
        tokens_BT, targets_BT, segments_BT = rows_of(segments, length)
        whole = outputs_and_gradients(model_of(name), tokens_BT, targets_BT, segments_BT)
        piece = slice([0, *cuts][rank], [*cuts, length][rank])
        own_targets_BT = targets_BT[:, piece]
        share = int((own_targets_BT != IGNORE).sum()) / int((targets_BT != IGNORE).sum())
        model = model_of(name)
        with context_parallel(model):
            found = outputs_and_gradients(
                model, tokens_BT[:, piece], own_targets_BT, None if segments_BT is None else segments_BT[:, piece], share
            )
        real_BT = torch.ones_like(tokens_BT[:, piece], dtype=torch.bool) if segments_BT is None else segments_BT[:, piece] != 0
        torch.testing.assert_close(found[0][real_BT], whole[0][:, piece][real_BT], rtol=0, atol=1e-10)
        for own, expected in zip((found[1], *found[2]), (whole[1], *whole[2]), strict=True):
            dist.all_reduce(own)
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)


def compare_all(rank, cases):
    for name in MODELS:
        compare(rank, name, cases)


@pytest.mark.slow
def test_two_pieces_make_the_outputs_and_gradients_of_one(tmp_path):
    in_processes(2, compare_all, tmp_path, TWO)


@pytest.mark.slow
def test_four_pieces_make_the_outputs_and_gradients_of_one(tmp_path):
    in_processes(4, compare_all, tmp_path, FOUR)


def refuse(rank):
    with pytest.raises(InputError, match="layer 1 is 'attention', which needs a sequence whole"), context_parallel(LanguageModel(stack(("gam", "attention")))):
        pass
    with pytest.raises(InputError, match="positions is 'learned'"), context_parallel(LanguageModel(stack("gam", positions="learned"))):
        pass
    model = model_of("gam")
    with pytest.raises(InputError, match="state is given"), context_parallel(model):
        model.stream(torch.zeros(1, 3, dtype=torch.long), model.initial_state(1))
    rows_BT = torch.arange(7).view(1, 7)
    assert torch.equal(piece_of(rows_BT), rows_BT[:, :4] if rank == 0 else rows_BT[:, 4:])
    with pytest.raises(InputError, match="1 tokens for 2 processes"):
        piece_of(rows_BT[:, :1])
    assert [int(each) for each in Pieces(group=None).gather(torch.tensor(rank))] == [0, 1]


def test_layers_that_need_a_sequence_whole_are_refused_in_one_line(tmp_path):
    in_processes(2, refuse, tmp_path)
