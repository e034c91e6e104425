"""Gated DeltaNet against its equations, a token at a time, and against transformers' layer of Qwen3-Next with the same weights."""

import math

import pytest
import torch

from gam_lm.config import ModelConfig
from gam_lm.mixers.gated_deltanet import GatedDeltaNet
from gam_lm.mixers.gated_deltanet_options import GatedDeltaNetOptions


def mixer_of(hidden_size=16, **options):
    """With weights large enough that every path matters."""
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=7, hidden_size=hidden_size, mixers=("gated_deltanet",), layer_norm_eps=1e-6,
        options=(GatedDeltaNetOptions(**{"num_heads": 2, "chunk_size": 16} | options),),
    )  # fmt: skip
    mixer = GatedDeltaNet(config)
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def gated_delta_rule(q, k, v, beta, g, S):
    """The recurrence of arXiv 2412.06464, equation 10, with one state S (E, M) per head: S_t = S_{t−1} α_t (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, o_t = S_t q_t.

    As FLA's ``naive_recurrent_gated_delta_rule`` computes it: decay, take back what the key held, write, read with q / √M.
    """
    outputs = []
    for t in range(len(q)):
        alpha = g[t].exp()
        eye = torch.eye(k.shape[1], dtype=k.dtype)
        S = alpha * S @ (eye - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        outputs.append(S @ q[t] / math.sqrt(q.shape[1]))
    return torch.stack(outputs), S


def by_the_equations(mixer, h_TD):
    """One sequence through the layer, with nothing but products and sums."""
    options = mixer.options
    H, K = options.num_heads, options.conv_kernel_size
    Q, V = round(options.expand_k * h_TD.shape[1]), round(options.expand_v * h_TD.shape[1])

    def silu(x):
        return x / (1 + (-x).exp())

    projected = h_TD @ mixer.qkv_proj.weight.T
    padded = torch.cat([projected.new_zeros(K - 1, projected.shape[1]), projected])
    short = silu(torch.stack([sum(mixer.conv.weight[:, i] * padded[t + i] for i in range(K)) for t in range(len(h_TD))]))
    beta, step = (h_TD @ mixer.write_proj.weight.T).chunk(2, -1)
    beta = options.max_write / (1 + (-beta).exp())
    g = -mixer.log_rate.exp() * torch.log1p((step + mixer.step_bias).exp())
    heads, states = [], []
    for i in range(H):
        q, k, v = (part.chunk(H, -1)[i] for part in short.split([Q, Q, V], -1))
        q, k = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
        o, S = gated_delta_rule(q, k, v, beta[:, i], g[:, i], h_TD.new_zeros(V // H, Q // H))
        heads.append(o / (o.square().mean(-1, keepdim=True) + mixer.config.layer_norm_eps).sqrt() * mixer.norm)
        states.append(S.T)
    gate = silu(h_TD @ mixer.gate_proj.weight.T)
    return (torch.cat(heads, -1) * gate) @ mixer.out_proj.weight.T, torch.stack(states), padded[len(h_TD) :]


def same(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())


@pytest.mark.parametrize("options", [{}, {"max_write": 2.0}, {"num_heads": 1, "conv_kernel_size": 1}, {"expand_k": 1.0, "expand_v": 2.0, "num_heads": 4}])
@pytest.mark.parametrize("T", [1, 3, 16, 50])
def test_the_layer_equals_its_equations_with_all_gradients(T, options):
    mixer, x = mixer_of(**options).double(), torch.randn(1, T, 16, dtype=torch.float64, requires_grad=True)
    y, (conv_state, memory) = mixer(x)
    expected, states, window = by_the_equations(mixer, x[0])
    same(y[0], expected)
    same(memory[0], states)
    same(conv_state[0], window) if window.numel() else None
    weights = torch.randn_like(expected), torch.randn_like(states)
    leaves = [x, *mixer.parameters()]
    grads = torch.autograd.grad((y[0] * weights[0]).sum() + (memory[0] * weights[1]).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights[0]).sum() + (states * weights[1]).sum(), leaves)
    assert all(grad.abs().max() > 0 for grad in wanted) or T == 1  # the first token meets no state
    for ours, theirs in zip(grads, wanted, strict=True):
        same(ours, theirs)


def qwen3_next(mixer):
    """transformers' layer with the weights of ``mixer``: queries, keys, values and gates of each head stand together there."""
    pytest.importorskip("transformers", reason="pip install 'gam-lm[hf]'")
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    H, (Q, _, V) = mixer.num_heads, mixer.split_sizes
    config = Qwen3NextConfig(
        hidden_size=mixer.config.hidden_size, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=Q // H, linear_value_head_dim=V // H,
        linear_conv_kernel_dim=mixer.options.conv_kernel_size, rms_norm_eps=mixer.config.layer_norm_eps, num_hidden_layers=1, layer_types=["linear_attention"],
        hidden_act="silu",
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    q, k, v = mixer.qkv_proj.weight.split([Q, Q, V])
    by_head = [part.unflatten(0, (H, -1)) for part in (q, k, v, mixer.gate_proj.weight)]
    with torch.no_grad():
        layer.in_proj_qkvz.weight.copy_(torch.cat(by_head, 1).flatten(0, 1))
        layer.in_proj_ba.weight.copy_(torch.stack(mixer.write_proj.weight.chunk(2), 1).flatten(0, 1))
        layer.conv1d.weight.copy_(mixer.conv.weight[:, None])
        layer.dt_bias.copy_(mixer.step_bias)
        layer.A_log.copy_(mixer.log_rate)
        layer.norm.weight.copy_(mixer.norm)
        layer.out_proj.weight.copy_(mixer.out_proj.weight)
    return layer


@pytest.mark.parametrize("T", [1, 5, 64, 131])
def test_the_layer_equals_that_of_qwen3_next(T):
    """In fp32, in which transformers takes the rule whatever the weights are: outputs, and the gradients of all that they share."""
    mixer = mixer_of(hidden_size=32)
    layer, x = qwen3_next(mixer), torch.randn(2, T, 32)
    y, expected = mixer(x)[0], layer(x)
    same(y, expected, 1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    H, (Q, _, V) = mixer.num_heads, mixer.split_sizes
    q, k, v, z = (part.flatten(0, 1) for part in layer.in_proj_qkvz.weight.grad.unflatten(0, (H, -1)).split([Q // H, Q // H, V // H, V // H], 1))
    pairs = [
        (mixer.qkv_proj.weight.grad, torch.cat([q, k, v])), (mixer.gate_proj.weight.grad, z), (mixer.conv.weight.grad, layer.conv1d.weight.grad[:, 0]),
        (mixer.write_proj.weight.grad, torch.cat([part.flatten(0, 1) for part in layer.in_proj_ba.weight.grad.unflatten(0, (H, 2)).split(1, 1)])),
        (mixer.step_bias.grad, layer.dt_bias.grad), (mixer.log_rate.grad, layer.A_log.grad), (mixer.norm.grad, layer.norm.weight.grad),
        (mixer.out_proj.weight.grad, layer.out_proj.weight.grad),
    ]  # fmt: skip
    for ours, theirs in pairs:
        same(ours, theirs, 1e-5)


def test_decays_and_projections_start_as_published():
    config = ModelConfig(vocab_size=7, hidden_size=512, num_hidden_layers=8, mixers=("gated_deltanet",), options=(GatedDeltaNetOptions(num_heads=128),))
    mixer = GatedDeltaNet(config)
    mixer.init_weights()
    rate, step = mixer.log_rate.detach().exp(), torch.nn.functional.softplus(mixer.step_bias.detach())
    assert rate.min() >= 1 and rate.max() <= 16 and abs(float(rate.mean()) - 8.5) < 4 * 15 / math.sqrt(12 * 128)
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 0.1 * 1.001
    assert abs(float(step.log().mean()) - math.log(1e-2)) < 4 * math.log(100) / math.sqrt(12 * 128)
    assert (mixer.norm == 1).all()
    assert abs(float(mixer.qkv_proj.weight.detach().std()) * math.sqrt(512) - 1) < 0.02
    assert abs(float(mixer.out_proj.weight.detach().std()) * math.sqrt(768 * 16) - 1) < 0.02  # mixer and network of eight layers add to the stream
