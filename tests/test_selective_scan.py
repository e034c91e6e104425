"""The chunked scan against the recurrence, a token at a time, in float64."""

import pytest
import torch

from gam_lm.ops.selective_scan import naive_selective_scan, selective_scan


def inputs(T, step=1.0, B=2, E=3, N=2):
    x, b, c = (torch.randn(B, T, n, dtype=torch.float64) for n in (E, N, N))
    dt = step * torch.rand(B, T, E, dtype=torch.float64)
    A = -torch.rand(N, E, dtype=torch.float64) * 3
    return [each.requires_grad_() for each in (x, dt, A, b, c, torch.randn(B, N, E, dtype=torch.float64))]


def assert_same(arguments, chunk_size, index=None):
    y, last = selective_scan(*arguments, chunk_size=chunk_size, index_BT=index)
    expected = naive_selective_scan(*arguments, index)
    weights = [torch.randn_like(each) for each in expected]
    grads = torch.autograd.grad(sum((a * w).sum() for a, w in zip((y, last), weights, strict=True)), arguments)
    wanted = torch.autograd.grad(sum((a * w).sum() for a, w in zip(expected, weights, strict=True)), arguments)
    for ours, theirs in zip((y, last, *grads), (*expected, *wanted), strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("T", [1, 2, 16, 37, 129, 300])
def test_the_chunked_scan_equals_the_recurrence_with_all_gradients(T, chunk_size):
    assert_same(inputs(T), chunk_size)


@pytest.mark.parametrize("T", [1, 5, 40])
def test_the_state_is_cleared_where_a_sequence_starts(T):
    starts = torch.rand(2, T) < 0.25
    assert_same(inputs(T), 8, starts.long().cumsum(1))


def test_steps_of_size_zero_change_nothing_and_huge_ones_forget_everything():
    x, dt, *rest = inputs(20)
    with torch.no_grad():
        dt[:, 4:9] = 0
        dt[:, 12] = 1e4
    arguments = [x, dt, *rest]
    assert_same(arguments, 8)
    y, _ = selective_scan(*arguments, chunk_size=8)
    assert y.isfinite().all()


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, chunk_size=3), inputs(7))


def test_half_precision_inputs_are_computed_in_float32():
    arguments = [each.detach().bfloat16() for each in inputs(30)]
    y, last = selective_scan(*arguments, chunk_size=8)
    assert y.dtype == last.dtype == torch.float32
    expected, _ = naive_selective_scan(*(each.double() for each in arguments))
    assert (y - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_sequential_steps_are_those_of_one_chunk_and_of_the_chunks(monkeypatch):
    import gam_lm.ops.selective_scan as module

    steps = []
    original = module._decay
    monkeypatch.setattr(module, "_decay", lambda *a: (steps.append(1), original(*a))[1])
    carried = []
    addcmul = torch.addcmul
    monkeypatch.setattr(torch, "addcmul", lambda *a, **k: (carried.append(1), addcmul(*a, **k))[1])
    with torch.no_grad():
        selective_scan(*inputs(256), chunk_size=32)
    assert len(steps) == 32 and len(carried) == 256 // 32 - 1


def test_on_a_cpu_chunks_are_as_long_as_leaves_a_place_full(monkeypatch):
    import gam_lm.ops.selective_scan as module

    monkeypatch.setattr(module, "SLAB", 48)  # numbers; a place of one chunk in each of two rows has 12
    assert module.chunk_length(2, 300, 6, 16, "cpu") == 75  # four chunks fill it
    assert module.chunk_length(8, 300, 6, 16, "cpu") == module.chunk_length(9, 300, 6, 16, "cpu") == 300
    assert module.chunk_length(2, 300, 6, 100, "cpu") == 100
    assert module.chunk_length(2, 300, 6, 16, "cuda") == 16
    assert_same(inputs(300), 16)
    assert_same(inputs(299), 16, (torch.rand(2, 299) < 0.05).long().cumsum(1))
