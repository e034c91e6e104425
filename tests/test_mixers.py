"""The contract that every mixer keeps."""

import copy

import pytest
import torch

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers import REGISTRY, mixer_class
from gam_lm.model import LanguageModel, count_parameters

VARIANTS = {
    "gam": {},
    "gam-k1": {"conv_kernel_size": 1},
    "gam-sum": {"fusion": "sum"},
    "gam-global": {"fusion": "global"},
    "gam-local": {"fusion": "local"},
    "gam-global-gated": {"fusion": "global", "keep_gate": True},
    "gam-local-gated": {"fusion": "local", "keep_gate": True},
    "gam-silu": {"gate_activation": "silu"},
    "gam-mean": {"write": "mean"},
    "gam-mean-silu": {"write": "mean", "gate_activation": "silu"},
    "gam-delta": {"write": "delta"},
    "gam-delta-k2-sum": {"write": "delta", "fusion": "sum", "conv_kernel_size": 2},
    "gam-delta-closed": {"write": "delta", "write_gate": "closed"},
    "gam-delta-keys": {"write": "delta", "write_address": "keys"},
    "gam-delta-keys-silu": {"write": "delta", "write_address": "keys", "gate_activation": "silu"},
    "gam-delta-beside": {"write": "delta", "static_path": True},
    "attention": {"mixer": "attention"},
    "attention-rotary": {"mixer": "attention", "positions": "rotary"},
    "attention-materialised": {"mixer": "attention", "backend": "materialised"},
    "mamba": {"mixer": "mamba", "conv_kernel_size": 4},
    "mamba-bare": {"mixer": "mamba", "conv_kernel_size": 4, "stack": "bare", "expand": 3},
}


def config(name, **changes):
    values = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_memory_slots": 6, "state_size": 3,
              "dropout": 0.0, "chunk_size": 8, "positions": "none"}  # fmt: skip
    return ModelConfig(**(values | VARIANTS[name] | changes))


def mixer_of(name, **changes):
    """A mixer in float64 with weights large enough that every path matters."""
    torch.manual_seed(1)
    mixer = mixer_class(config(name, **changes).mixer)(config(name, **changes)).double()
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("name", ["gam", "gam-silu", "gam-global-gated", "gam-mean-silu", "gam-delta-keys-silu"])
def test_a_gate_starts_open(name):
    torch.manual_seed(1)
    mixer = mixer_class("gam")(config(name, hidden_size=64))
    mixer.init_weights()
    x_BTD = torch.nn.functional.layer_norm(torch.randn(3, 50, 64), (64,))
    assert all(0.4 < gate.mean() < 1 and (gate > 0).all() for gate in mixer.trace(x_BTD).gates.values())


def inputs(B=2, T=21, D=8):
    return torch.randn(B, T, D, dtype=torch.float64)


def same(a, b):
    assert a.shape == b.shape
    if not a.numel():
        return
    assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())


every_mixer = pytest.mark.parametrize("name", VARIANTS)


def test_every_registered_mixer_is_under_test():
    assert set(REGISTRY) == {config(name).mixer for name in VARIANTS}


@every_mixer
def test_a_later_token_changes_no_earlier_output_by_a_bit(name):
    mixer, x = mixer_of(name).float(), inputs().float()
    before, _ = mixer(x)
    for t in (1, 7, 8, 9, 20):
        changed = x.clone()
        changed[:, t:] = torch.randn_like(changed[:, t:])
        after, _ = mixer(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@every_mixer
@pytest.mark.parametrize("cuts", [(1,), (8, 16), (3, 4, 5, 20), tuple(range(1, 21))])
def test_pieces_of_a_sequence_equal_one_pass(name, cuts):
    mixer, x = mixer_of(name), inputs()
    whole, last = mixer(x)
    state, pieces = None, []
    for start, end in zip((0, *cuts), (*cuts, 21), strict=True):
        y, state = mixer(x[:, start:end], state)
        pieces.append(y)
    same(torch.cat(pieces, 1), whole)
    for a, b in zip(state, last, strict=True):
        same(a.double(), b.double())


@every_mixer
def test_the_initial_state_equals_no_state(name):
    mixer, x = mixer_of(name), inputs()
    same(mixer(x, mixer.initial_state(2, dtype=torch.float64))[0], mixer(x)[0])


@every_mixer
def test_the_state_has_the_size_that_cost_says(name):
    mixer, x = mixer_of(name).float(), inputs(B=3).float()
    _, state = mixer(x)
    assert all(len(part) == 3 for part in state)
    assert sum(part.numel() * part.element_size() for part in state) == 3 * mixer.cost(mixer.config, 21).state_bytes


@every_mixer
def test_cost_counts_the_parameters(name):
    mixer = mixer_of(name)
    assert sum(p.numel() for p in mixer.parameters()) == mixer.cost(mixer.config, 16).parameters


PACKED = torch.tensor([
    [1] * 5 + [2] * 9 + [3] * 7,
    [0] * 3 + [4] * 10 + [0] * 2 + [4] * 2 + [5] * 1 + [4] * 1 + [0] * 2,
    [0] * 21,
    [7] * 21,
])  # fmt: skip


def sequences_of(row):
    """Places of each sequence of a row of segments: padding left out, split where the id changes."""
    found, previous = [], None
    for t, value in enumerate(row.tolist()):
        if value == 0:
            continue
        if value != previous:
            found.append([])
        found[-1].append(t)
        previous = value
    return found


@every_mixer
def test_packed_and_padded_rows_equal_the_separate_sequences(name):
    mixer, x = mixer_of(name), inputs(B=4).requires_grad_()
    y, state = mixer(x, segments_BT=PACKED)
    assert y.isfinite().all()
    real = torch.zeros_like(y)
    for b, row in enumerate(PACKED):
        for places in sequences_of(row):
            alone, alone_state = mixer(x[b : b + 1, places])
            same(y[b, places], alone[0])
            real[b, places] = 1.0
        if sequences_of(row) and config(name).mixer != "attention":  # attention's cache is as long as the row
            for part, alone_part in zip(state, alone_state, strict=True):
                same(part[b], alone_part[0])
    (y * real * torch.randn_like(y)).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[PACKED == 0] == 0).all()


@every_mixer
def test_a_padded_piece_goes_on_with_the_state_of_its_row(name):
    mixer, x = mixer_of(name), inputs(B=1, T=12)
    whole, _ = mixer(x)
    _, state = mixer(torch.cat([x[:, :7], inputs(1, 2)], 1), segments_BT=torch.tensor([[1] * 7 + [0] * 2]))
    second = torch.cat([inputs(1, 3), x[:, 7:9], inputs(1, 1), x[:, 9:], inputs(1, 4)], 1)
    segments = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 1, 2, 2, 2, 2]])
    y, state = mixer(second, state, segments_BT=segments)
    same(y[:, [3, 4, 6, 7, 8]], whole[:, 7:])
    fresh, _ = mixer(second[:, 9:])
    same(y[:, 9:], fresh)
    more = inputs(1, 3)
    same(mixer(more, state)[0], mixer(torch.cat([second[:, 9:], more], 1))[0][:, 4:])


@every_mixer
def test_gradients_equal_finite_differences(name):
    mixer = mixer_of(name, chunk_size=2)
    x = inputs(1, 5).requires_grad_()
    parameters = {k: v.detach().requires_grad_() for k, v in mixer.named_parameters()}

    def output(x, *values):
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(output, (x, *parameters.values()))


def compiled_equals_eager(name, backend):
    torch._dynamo.reset()
    model = LanguageModel(config(name, chunk_size=4)).double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    tokens = torch.randint(31, (2, 13))
    for each in (model, compiled):
        each(tokens[:, :-1], tokens[:, 1:])[1].backward()
    same(compiled(tokens)[0], model(tokens)[0])
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        same(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["gam", "gam-mean", "gam-delta", "attention", "attention-rotary", "mamba"])
def test_a_compiled_model_equals_eager(name):
    compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gam", "gam-mean", "gam-delta", "attention", "mamba"])
def test_a_model_compiled_by_inductor_equals_eager(name):
    compiled_equals_eager(name, "inductor")


@every_mixer
def test_bf16_autocast_is_finite_and_near(name):
    model = LanguageModel(config(name))
    tokens = torch.randint(31, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss - model(tokens[:, :-1], tokens[:, 1:])[1]) < 0.05


@every_mixer
def test_weights_in_bf16_train_and_stream(name):
    model = LanguageModel(config(name))
    tokens = torch.randint(31, (2, 20))
    expected = model(tokens, tokens)[1].detach()
    model.bfloat16()
    loss = model(tokens, tokens)[1]
    loss.backward()
    assert abs(loss - expected) < 0.05 and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        _, state = model.stream(tokens[:, :19])
        logits, _ = model.stream(tokens[:, 19:], state)
        assert (logits - model(tokens)[0][:, 19:]).abs().max() < 0.1


@every_mixer
def test_a_model_is_built_without_memory_and_copied(name):
    with torch.device("meta"):
        model = LanguageModel(config(name))
    model.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    tokens = torch.randint(31, (1, 9))
    assert torch.equal(copy.deepcopy(model)(tokens)[0], model(tokens)[0])


PUBLISHED = {
    "gam": ({}, 22_599_680),
    "transformer": ({"mixer": "attention"}, 24_166_400),
    "mamba": ({"mixer": "mamba", "stack": "bare", "expand": 3, "conv_kernel_size": 4}, 20_504_576),
    "sum": ({"fusion": "sum"}, 19_447_808),
    "global": ({"fusion": "global"}, 19_435_520),
    "local": ({"fusion": "local"}, 17_874_944),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    changes, count = PUBLISHED[name]
    assert count_parameters(ModelConfig(vocab_size=10_000, **changes)) == count


def test_an_unknown_mixer_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'mamba'"):
        LanguageModel(ModelConfig(vocab_size=3, mixer="mambo"))
