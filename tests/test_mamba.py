"""Mamba's block against its equations, a token at a time, and its initialisation. What every mixer must keep is in test_mixers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from gam_lm.config import ModelConfig
from gam_lm.mixers.base import INIT_STD
from gam_lm.mixers.mamba import Mamba
from gam_lm.mixers.mamba_options import MambaOptions

OPTIONS = {field.name for field in dataclasses.fields(MambaOptions)}


def mixer_of(**changes):
    torch.manual_seed(3)
    options = {"state_size": 3, "chunk_size": 16} | {name: changes.pop(name) for name in OPTIONS & changes.keys()}
    values = {"vocab_size": 7, "mixers": ("mamba",), "hidden_size": 20, "num_hidden_layers": 2, "initialization": "scaled"}
    mixer = Mamba(ModelConfig(**(values | changes), options=(MambaOptions(**options),)))
    mixer.init_weights()
    return mixer


def perturbed(mixer):
    """In float64, with weights large enough that every path matters."""
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def by_the_equations(mixer, h_TD):
    """One sequence through the block, each token from the one before, with nothing but products and sums."""
    E, N = mixer.A_log.shape[1], mixer.A_log.shape[0]
    K, R = mixer.conv.weight.shape[1], mixer.dt_proj.weight.shape[1]
    window = [torch.zeros(E, dtype=h_TD.dtype)] * K
    state_NE = torch.zeros(N, E, dtype=h_TD.dtype)
    outputs = []
    for h_D in h_TD:
        both = mixer.in_proj.weight @ h_D
        x_E, z_E = both[:E], both[E:]
        window = [*window[1:], x_E]
        x_E = mixer.conv.bias + sum(mixer.conv.weight[:, k] * window[k] for k in range(K))
        x_E = x_E * torch.sigmoid(x_E)
        selected = mixer.x_proj.weight @ x_E
        dt_E = torch.log1p(torch.exp(mixer.dt_proj.weight @ selected[:R] + mixer.dt_proj.bias))
        B_N, C_N = selected[R : R + N], selected[R + N :]
        state_NE = torch.exp(-torch.exp(mixer.A_log) * dt_E) * state_NE + torch.outer(B_N, dt_E * x_E)
        y_E = C_N @ state_NE + mixer.skip * x_E
        outputs.append(mixer.out_proj.weight @ (y_E * z_E * torch.sigmoid(z_E)))
    return torch.stack(outputs), torch.stack(window[1:]), state_NE


def same(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())


@pytest.mark.parametrize("T", [1, 3, 16, 17, 50])
def test_the_block_equals_its_equations_with_all_gradients(T):
    mixer, x = perturbed(mixer_of()), torch.randn(1, T, 20, dtype=torch.float64, requires_grad=True)
    y, (conv_state, scan_state) = mixer(x)
    expected, window, state = by_the_equations(mixer, x[0])
    for ours, theirs in ((y[0], expected), (conv_state[0], window), (scan_state[0], state)):
        same(ours, theirs)
    weights = torch.randn_like(expected), torch.randn_like(state)
    leaves = [x, *mixer.parameters()]
    grads = torch.autograd.grad((y[0] * weights[0]).sum() + (scan_state[0] * weights[1]).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights[0]).sum() + (state * weights[1]).sum(), leaves)
    for ours, theirs in zip(grads, wanted, strict=True):
        same(ours, theirs)


def test_gradients_flow_through_the_state_from_piece_to_piece():
    mixer, x = perturbed(mixer_of()), torch.randn(2, 45, 20, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    weight = torch.randn_like(x)
    state, pieces = None, []
    for piece in x.split([20, 1, 24], 1):
        y, state = mixer(piece, state)
        pieces.append(y)
    grads = torch.autograd.grad((torch.cat(pieces, 1) * weight).sum(), leaves)
    wanted = torch.autograd.grad((mixer(x)[0] * weight).sum(), leaves)
    for ours, theirs in zip(grads, wanted, strict=True):
        same(ours, theirs)


def test_sequences_that_start_at_the_borders_of_chunks_equal_the_separate_ones():
    mixer, x = perturbed(mixer_of(chunk_size=8)), torch.randn(1, 40, 20, dtype=torch.float64)
    segments = torch.tensor([[1] * 8 + [2] * 7 + [3] * 1 + [4] * 1 + [0] * 15 + [4] * 8])
    y, state = mixer(x, segments_BT=segments)
    for places in (range(8), range(8, 15), range(15, 16), [16, *range(32, 40)]):
        alone, alone_state = mixer(x[:, list(places)])
        same(y[:, list(places)], alone)
    for part, alone_part in zip(state, alone_state, strict=True):
        same(part, alone_part)


def test_the_chunk_size_changes_nothing_but_rounding():
    x = torch.randn(2, 50, 20, dtype=torch.float64)
    expected, _ = perturbed(mixer_of(chunk_size=64))(x)
    for chunk_size in (1, 2, 7, 9, 25, 49):
        same(perturbed(mixer_of(chunk_size=chunk_size))(x)[0], expected)


def test_the_output_is_the_same_with_and_without_gradients():
    mixer, x = mixer_of(), torch.randn(2, 50, 20)
    expected, _ = mixer(x)
    with torch.no_grad():
        assert torch.equal(mixer(x)[0], expected)


def test_steps_so_large_that_everything_is_forgotten_stay_finite():
    mixer, x = perturbed(mixer_of()), torch.randn(1, 50, 20, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        mixer.dt_proj.bias.fill_(600.0)
    y, _ = mixer(x)
    same(y[0], by_the_equations(mixer, x[0])[0])
    y.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())


def test_a_bf16_mixer_keeps_its_state_space_in_float32():
    mixer, x = mixer_of().bfloat16(), torch.randn(2, 50, 20, dtype=torch.bfloat16)
    y, (conv_state, scan_state) = mixer(x)
    assert y.dtype == conv_state.dtype == torch.bfloat16 and scan_state.dtype == torch.float32
    y.float().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())
    _, (_, scan_state) = mixer(x[:, :1], (conv_state, scan_state))
    assert scan_state.dtype == torch.float32


def test_the_published_mixer_has_its_published_parameters():
    config = ModelConfig(vocab_size=7, mixers=("mamba",), hidden_size=512, options=(MambaOptions(expand=3.0),))
    with torch.device("meta"):
        mixer = Mamba(config)
    assert sum(p.numel() for p in mixer.parameters()) == Mamba.cost(config, 256).parameters == 2_542_080
    assert Mamba.reach(config) is None


def test_the_rank_of_the_step_size_is_rounded_up_and_expand_may_be_a_fraction():
    mixer = mixer_of(hidden_size=20, expand=1.5)
    assert mixer.dt_proj.weight.shape == (30, 2)
    assert mixer(torch.randn(1, 5, 20))[0].shape == (1, 5, 20)


@pytest.mark.parametrize("initialization", ["scaled", "paper"])
def test_rates_and_step_sizes_start_as_published(initialization):
    mixer = mixer_of(hidden_size=512, state_size=16, initialization=initialization)
    rates = mixer.A_log.detach().exp()
    assert torch.allclose(rates, torch.arange(1, 17.0)[:, None].expand_as(rates))
    assert (mixer.skip == 1).all()
    step = F.softplus(mixer.dt_proj.bias.detach())
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 0.1 * 1.001
    quarters = torch.histc(step.log(), 4, math.log(1e-3), math.log(0.1)) / len(step)
    assert ((quarters - 0.25).abs() < 0.06).all()  # log-uniform: four standard deviations of 1,024 draws
    bound = 32**-0.5
    assert 0.99 * bound < mixer.dt_proj.weight.abs().max() <= bound
    assert 0.45 < mixer.conv.weight.abs().max() <= 0.5  # 1 / √4 taps


def test_projections_start_by_the_initialization():
    """Eight layers without feed-forward networks add to the residual stream eight times."""
    scaled, paper = (mixer_of(hidden_size=512, num_hidden_layers=8, initialization=name) for name in ("scaled", "paper"))
    for name, std in (("in_proj", INIT_STD), ("x_proj", INIT_STD), ("out_proj", INIT_STD / math.sqrt(8))):
        assert abs(getattr(scaled, name).weight.std() / std - 1) < 0.03
        weight = getattr(paper, name).weight
        bound = weight.shape[1] ** -0.5
        assert 0.99 * bound < weight.abs().max() <= bound and abs(weight.std() * math.sqrt(3) / bound - 1) < 0.03
