"""The causal convolution against its sum over taps."""

import pytest
import torch

from gam_lm.ops.causal_conv import causal_conv, last_inputs, naive_causal_conv
from gam_lm.ops.segments import read_segments


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_sum_over_taps_with_its_gradients_in_one_call_or_several(K, bias):
    x, weight = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    bias_C = torch.randn(3, dtype=torch.float64, requires_grad=True) if bias else None
    given = [x, weight, *([bias_C] if bias else [])]
    expected, pieces, state = naive_causal_conv(x, weight, bias_C), [], None
    for piece in x.split([1, 3, 0, 7], 1):
        y, state = causal_conv(piece, weight, bias_C, state)
        pieces.append(y)
    slope = torch.randn_like(expected)
    for y in (torch.cat(pieces, 1), causal_conv(x, weight, bias_C)[0]):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(y, given, slope), torch.autograd.grad(expected, given, slope, retain_graph=True), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("J", [0, 1, 4])
@pytest.mark.parametrize("T", [0, 1, 3, 9])
def test_the_last_inputs_are_the_state_that_the_convolution_leaves(J, T):
    x, before, weight = torch.randn(2, T, 3), torch.randn(2, J, 3), torch.randn(3, J + 1)
    segments = read_segments(torch.arange(2 * T).view(2, T) % 3) if T else None
    for state in (None, before):
        for rows in (None, segments):
            assert torch.equal(last_inputs(x, J, state, rows), causal_conv(x, weight, None, state, rows)[1])
