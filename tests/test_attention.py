"""Attention against loops over tokens: with a window, norms of queries and keys, a convolution, and in the place of GAM's memory."""

import math

import pytest
import torch

from gam_lm.config import ModelConfig
from gam_lm.mixers import key_value_cache
from gam_lm.mixers.attention import Attention
from gam_lm.mixers.attention_options import AttentionOptions
from gam_lm.mixers.gam import GAMMixer
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.ops.rotary import rotate

D, H = 8, 2


def perturbed(mixer):
    """In float64, with weights large enough that every path matters."""
    mixer = mixer.double()
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def attention_of(**options):
    options = AttentionOptions(**{"num_heads": H} | options)
    return perturbed(Attention(ModelConfig(vocab_size=7, hidden_size=D, mixers=("attention",), layer_norm_eps=1e-3, options=(options,))))


def softmax_loop(q, k, v, scale, window=None):
    """Each token over those of its window, one score at a time: q, k (T, M) and v (T, E) of one head."""
    outputs = []
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        weights = [(scale * (q[t] @ k[i])).exp() for i in range(first, t + 1)]
        outputs.append(sum(w * v[i] for w, i in zip(weights, range(first, t + 1), strict=True)) / sum(weights))
    return torch.stack(outputs)


def taps(x, conv):
    """K taps over the current row and those before it."""
    K = conv.weight.shape[1]
    padded = torch.cat([x.new_zeros(K - 1, x.shape[1]), x])
    return torch.stack([sum(conv.weight[:, k] * padded[t + k] for k in range(K)) + conv.bias for t in range(len(x))])


def turned(x, t):
    """Rotary positions as complex numbers: pair i of the E channels is turned by t / 10000^(2i/E)."""
    half = len(x) // 2
    turn = torch.polar(torch.ones(half, dtype=x.dtype), t * 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half))
    product = torch.complex(x[:half], x[half:]) * turn
    return torch.cat([product.real, product.imag])


def attention_by_a_loop(mixer, h):
    """One sequence (T, D)."""
    options, E = mixer.options, D // H
    qkv = h @ mixer.qkv_proj.weight.T + mixer.qkv_proj.bias
    if mixer.conv is not None:
        qkv = qkv + taps(qkv, mixer.conv)
    heads = []
    for i in range(H):
        q, k, v = (part[:, i * E : (i + 1) * E] for part in qkv.split(D, -1))
        if options.qk_norm:
            q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight for x, norm in ((q, mixer.q_norm), (k, mixer.k_norm)))
        if options.rotary:
            q, k = (torch.stack([turned(x[t], t) for t in range(len(x))]) for x in (q, k))
        heads.append(softmax_loop(q, k, v, 1 / math.sqrt(E), options.window))
    return torch.cat(heads, -1) @ mixer.out_proj.weight.T + mixer.out_proj.bias


def near(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


def compare(mixer, expected_of, T):
    """Outputs and all gradients."""
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(x)[0][0], expected_of(mixer, x[0])
    near(found, expected)
    weight, leaves = torch.randn_like(expected), [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (found, expected)), strict=True):
        near(a, b)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "materialised"])
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True}, {"conv_kernel_size": 3}, {"conv_kernel_size": 1}, {"window": 1}, {"window": 5}, {"window": 200},
     {"window": 5, "qk_norm": True, "conv_kernel_size": 4}],
    ids=str,
)  # fmt: skip
def test_attention_is_a_loop_over_tokens(options, backend, rotary):
    compare(attention_of(backend=backend, rotary=rotary, **options), attention_by_a_loop, 17)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 11, 40])
def test_a_window_longer_or_shorter_than_a_block_is_the_same(window, monkeypatch):
    """Blocks of queries border on each other anywhere in a window."""
    monkeypatch.setattr(key_value_cache, "BLOCK", 4)
    mixer = attention_of(window=window)
    compare(mixer, attention_by_a_loop, 30)
    x = torch.randn(1, 30, D, dtype=torch.float64)
    expected, state, pieces = attention_by_a_loop(mixer, x[0]), None, []
    for piece in x.split([7, 1, 1, 13, 8], 1):
        y, state = mixer(piece, state)
        pieces.append(y[0])
    near(torch.cat(pieces), expected)


@pytest.mark.parametrize("window", [1, 3, 5, 40])
def test_a_window_counts_tokens_and_not_padding_and_ends_where_a_sequence_does(window, monkeypatch):
    monkeypatch.setattr(key_value_cache, "BLOCK", 4)
    mixer, x = attention_of(window=window, conv_kernel_size=2), torch.randn(1, 26, D, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 2, 2, 2, 0, 2, 2, 0, 0]])
    y, state = mixer(x, segments_BT=segments)
    for each in (1, 2):
        places = (segments[0] == each).nonzero()[:, 0]
        near(y[0, places], attention_by_a_loop(mixer, x[0, places]))
    assert y.isfinite().all()
    more = torch.randn(1, 6, D, dtype=torch.float64)
    near(mixer(more, state)[0][0], attention_by_a_loop(mixer, torch.cat([x[0, places], more[0]]))[-6:])


def test_a_turn_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)
    scores = [
        float((rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum()) for i, j in ((3, 1), (103, 101), (100_003, 100_001))
    ]  # fmt: skip
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("fusion", ["gate", "sum", "global"])
@pytest.mark.parametrize("gate_activation", ["silu", "sigmoid"])
def test_attention_in_the_place_of_the_memory_is_a_loop_over_tokens(fusion, gate_activation):
    """The equations of gam_lm.mixers.attention_memory: plain keys of at most length 1, written where the token before was read, and a learned temperature."""
    S = 10
    options = GAMOptions(memory="attention", fusion=fusion, gate_activation=gate_activation, num_heads=H, num_memory_slots=S, conv_kernel_size=3)
    mixer = perturbed(GAMMixer(ModelConfig(vocab_size=7, hidden_size=D, layer_norm_eps=1e-3, options=(options,))))

    def expected_of(mixer, h):
        memory, silu = mixer.written, torch.nn.functional.silu
        scores = h @ memory.address.T
        read, write = (silu(x).unflatten(-1, (H, -1)) for x in (scores, taps(scores, memory.before)))
        value = (h @ memory.value_proj.weight.T).unflatten(-1, (H, -1))
        heads = []
        for i in range(H):
            r, a = (x[:, i] / x[:, i].square().sum(-1, keepdim=True).sqrt().clamp(min=1) for x in (read, write))
            g = softmax_loop(r, a, value[:, i], memory.temperature[i])
            heads.append(g / (g.square().mean(-1, keepdim=True) + 1e-3).sqrt())
        local = taps(h, mixer.conv) if mixer.conv is not None else 0
        seen = torch.cat(heads, -1) * memory.norm
        if mixer.gate is not None:
            gates = h @ mixer.gate.weight.T + mixer.gate.bias
            local_gate, global_gate = (silu(gates) if gate_activation == "silu" else gates.sigmoid()).split(D, -1)
            local, seen = local_gate * local, global_gate * seen
        return local + seen @ memory.out_proj.weight.T

    compare(mixer, expected_of, 17)


@pytest.mark.parametrize("fusion", ["gate", "sum", "global"])
def test_self_attention_in_the_place_of_the_memory_is_a_loop_over_tokens(fusion):
    """The equations of gam_lm.mixers.self_attention_memory: queries and keys of their own, an RMSNorm per head, turned by their places; one tap will do."""
    options = GAMOptions(memory="self_attention", fusion=fusion, num_heads=H, conv_kernel_size=1)
    mixer = perturbed(GAMMixer(ModelConfig(vocab_size=7, hidden_size=D, layer_norm_eps=1e-3, options=(options,))))

    def root_mean_square(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    def expected_of(mixer, h):
        memory, silu = mixer.written, torch.nn.functional.silu
        query, key, value = (x.unflatten(-1, (H, -1)) for x in (h @ memory.qkv_proj.weight.T).split(D, -1))
        heads = []
        for i in range(H):
            q, k = (root_mean_square(x[:, i]) * norm.weight for x, norm in ((query, memory.q_norm), (key, memory.k_norm)))
            q, k = (torch.stack([turned(each, t) for t, each in enumerate(x)]) for x in (q, k))
            heads.append(root_mean_square(softmax_loop(q, k, value[:, i], math.sqrt(H / D))))
        local = taps(h, mixer.conv) if mixer.conv is not None else 0
        seen = torch.cat(heads, -1) * memory.norm
        if mixer.gate is not None:
            local_gate, global_gate = silu(h @ mixer.gate.weight.T + mixer.gate.bias).split(D, -1)
            local, seen = local_gate * local, global_gate * seen
        return local + seen @ memory.out_proj.weight.T

    compare(mixer, expected_of, 17)


def test_the_attention_of_llama_is_the_same_one_in_gams_block():
    """With the same weights, a shut local path and nothing else around it, g is what Llama's attention gives before its output projection."""
    llama = attention_of(qk_norm=True)
    options = GAMOptions(memory="self_attention", fusion="global", num_heads=H)
    mixer = perturbed(GAMMixer(ModelConfig(vocab_size=7, hidden_size=D, layer_norm_eps=1e-3, options=(options,))))
    with torch.no_grad():
        mixer.written.qkv_proj.weight.copy_(llama.qkv_proj.weight)
        for own, theirs in ((mixer.written.q_norm, llama.q_norm), (mixer.written.k_norm, llama.k_norm)):
            own.weight.copy_(theirs.weight)
        llama.qkv_proj.bias.zero_()
        llama.out_proj.bias.zero_()
        for out in (llama.out_proj, mixer.written.out_proj):
            out.weight.copy_(torch.eye(D))
    h = torch.randn(2, 9, D, dtype=torch.float64)
    g = llama(h)[0].unflatten(-1, (H, -1))
    near(mixer(h)[0], (g / (g.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * mixer.written.norm)


def test_keys_in_the_place_of_the_memory_start_as_the_token_before():
    config = ModelConfig(vocab_size=7, hidden_size=D, options=(GAMOptions(memory="attention", num_heads=H),))
    mixer = GAMMixer(config).double()
    mixer.init_weights()
    read, write = mixer.written.addresses(torch.randn(1, 9, D, dtype=torch.float64), None, None)
    near(write[:, 1:], read[:, :-1])
    assert (mixer.written.temperature == 8).all()
