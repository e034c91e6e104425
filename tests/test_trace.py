"""What the trace says is what the model does."""

import json
import tracemalloc

import pytest
import torch
from stacks import BASE, HYBRIDS, STACKS, WINDOWED, on, stack

from gam_lm.diagnostics.trace import records, trace
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_class, mixer_names
from gam_lm.model import LanguageModel
from gam_lm.ops.delta_rule import delta_memory
from gam_lm.ops.held import delta_held, mean_held
from gam_lm.ops.mean_rule import mean_memory
from gam_lm.ops.read_sources import MemoryInputs, delta_sources, mean_sources

SMALL = on(BASE, vocab_size=31, hidden_size=8, options={"gam": {"num_memory_slots": 6}})
STATIC, GLOBAL = "gam-static+gate_activation=sigmoid", "gam-static+gate_activation=sigmoid+fusion=global"
WRITTEN = [
    "gam",
    "gam-mean",
    "gam-slots",
    "gam-slots+gate_activation=sigmoid",
    "gam-slots+fusion=sum",
    "gam-slots+write_gate=closed",
    "gam-slots+static_path=true",
]
OTHERS = [
    "gam-static", STATIC, GLOBAL, "gam-static+fusion=sum", "gam-static+fusion=local", "gam-static+fusion=global+keep_gate=true", "gam-attention",
    "gam-self-attention+fusion=global",
    "transformer+rotary=false", "transformer+window=5", "mamba-paper+positions=none",
]  # fmt: skip
NAMES = [*WRITTEN, *OTHERS, *(name for name in STACKS if name not in WRITTEN)]
every_model = pytest.mark.parametrize("name", NAMES)
every_mixer = pytest.mark.parametrize("name", [name for name in NAMES if name not in HYBRIDS])


def mixer_of(name, **changes):
    """A mixer in float64 with weights large enough that every path matters."""
    torch.manual_seed(1)
    config = stack(name, SMALL, **changes)
    mixer = mixer_class(config.mixers[0])(config).double()
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def inputs(B=2, T=21, D=8):
    return torch.randn(B, T, D, dtype=torch.float64)


def same(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())


@every_mixer
def test_the_paths_add_up_to_the_output(name):
    mixer, x = mixer_of(name), inputs()
    _, state = mixer(x[:, :9])
    for begun in (None, state):
        found = mixer.trace(x[:, 9:], begun)
        same(sum(found.paths.values()), mixer(x[:, 9:], begun)[0])
        for shares in found.reads.values():
            same(shares.sum(-1), torch.ones_like(shares[..., 0]))
            assert (shares >= 0).all()


@every_mixer
def test_a_mixer_in_bf16_is_traced(name):
    mixer, x = mixer_of(name).bfloat16(), inputs().bfloat16()
    _, state = mixer(x[:, :9])
    for begun in (None, state):
        found = mixer.trace(x[:, 9:], begun)
        assert all(path.isfinite().all() for path in found.paths.values())
        torch.testing.assert_close(sum(found.paths.values()), mixer(x[:, 9:], begun)[0], rtol=0.05, atol=0.1)


def memory_inputs(T=13, B=2, H=2, M=3, E=4):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    given = MemoryInputs(
        random(B, T, H, M).softmax(-1), random(B, T, H, M).softmax(-1), random(B, T, H, E), random(B, T, H).sigmoid(), -random(B, T, H).exp()
    )
    return given, random(H, M, E), random(H, M).exp(), random(B, H, M, E), random(B, H, M).exp()


@pytest.mark.parametrize("rule", ["delta", "mean"])
@pytest.mark.parametrize("begun", [True, False])
def test_the_sources_are_the_derivative_of_the_read_by_the_values_and_add_up_to_it(rule, begun):
    given, bank, prior, D, Z = memory_inputs()

    def read(value):
        changed = given._replace(value_BTHE=value)
        if rule == "delta":
            return delta_memory(*changed, bank, (D,) if begun else None, chunk_size=4)[0]
        return mean_memory(*changed, bank, prior, (D, Z) if begun else None, chunk_size=4)[0]

    found = {
        "delta": lambda: delta_sources(given, bank, D if begun else None),
        "mean": lambda: mean_sources(given, bank, prior, (D, Z) if begun else None),
    }[rule]()
    derivative = torch.autograd.functional.jacobian(read, given.value_BTHE)  # (B, T, H, E) by (B, T, H, E)
    for b in range(2):
        for h in range(2):
            for e in range(4):
                same(derivative[b, :, h, e, b, :, h, e], found.weight_BHTI[b, h])
    parts = torch.einsum("bhti,bihe->bthe", found.weight_BHTI, given.value_BTHE) + found.carried_BTHE + found.bank_BTHE
    same(parts, read(given.value_BTHE))
    assert begun or not found.carried_BTHE.any()


@pytest.mark.parametrize("begun", [True, False])
def test_what_is_held_is_the_state_after_each_token(begun):
    given, bank, prior, D, Z = memory_inputs()
    delta, mean = delta_held(given, bank, D if begun else None), mean_held(given, bank, prior, (D, Z) if begun else None)
    for t in range(13):
        part = [each[:, : t + 1] for each in given]
        _, (D_t,) = delta_memory(*part, bank, (D,) if begun else None)
        same(delta[:, t], D_t.norm(dim=-1))
        _, (S_t, Z_t) = mean_memory(*part, bank, prior, (D, Z) if begun else None)
        slots = (prior[..., None] * bank + S_t) / (prior + Z_t)[..., None]
        same(mean[:, t], (slots - bank).norm(dim=-1))


def model_of(name, **changes):
    torch.manual_seed(3)
    model = LanguageModel(stack(name, SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@every_model
def test_surprise_is_the_loss_of_each_token_whatever_the_window(name):
    model = model_of(name).double()
    ids = torch.randint(31, (50,))
    logits, _ = model(ids[None])
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none").tolist()
    for window in (7, 50, 256):
        found = list(trace(model, ids.tolist(), window=window))
        assert [each.index for each in found] == list(range(50)) and found[0].surprise_nats is None
        assert [each.surprise_nats for each in found[1:]] == pytest.approx(expected, rel=1e-5)
        assert all(sum(chance for _, chance in each.predictions) <= 1.0001 and len(each.layers) == len(model.layers) for each in found)
    assert json.loads(json.dumps([each.to_dict() for each in found]))[-1]["index"] == 49
    assert model.training


@pytest.mark.parametrize("name", [*WRITTEN, WINDOWED])
def test_figures_do_not_depend_on_the_window_and_sources_name_earlier_tokens(name):
    model = model_of(name).double()
    ids = torch.randint(31, (40,)).tolist()
    whole, pieces = list(trace(model, ids, window=64)), list(trace(model, ids, window=8))
    for a, b in zip(whole, pieces, strict=True):
        for x, y in zip(a.layers, b.layers, strict=True):
            if set(x.added) == {"mixer", "feed_forward"}:  # attention tells no more than what it adds
                assert x.added == pytest.approx(y.added) and not x.gates and not x.sources
                continue
            assert x.added == pytest.approx(y.added) and x.gates == pytest.approx(y.gates) and x.write_gate == pytest.approx(y.write_gate)
            assert x.reads["written"].entropy_nats == pytest.approx(y.reads["written"].entropy_nats)
            assert all(index <= a.index for index, _ in x.sources) and all(index <= a.index for index, _ in x.taps)
            assert x.held == pytest.approx(y.held) and 0 < len(x.held) <= 32
            assert sum(share for _, share in x.taps) == pytest.approx(1)
            assert sum(share for _, share in x.sources) + x.before + x.bank <= 1 + 1e-9
            assert x.before == 0  # the whole text was one window
    later = pieces[-1].layers[0]
    assert name == "gam-slots+write_gate=closed" or later.before > 0
    assert all(index >= 40 - 16 for index, _ in later.sources)


@pytest.mark.parametrize(("name", "gate"), [(STATIC, torch.sigmoid), ("gam-static", torch.nn.functional.silu)])
@torch.no_grad()
def test_gates_and_entropy_are_those_of_the_paper(name, gate):
    model = model_of(name)
    ids = torch.randint(31, (9,))
    found = list(trace(model, ids.tolist()))
    block = model.layers[0]
    h = block.mixer_norm(model.embed_tokens(ids))
    gates = gate(block.mixer.gate(h))
    weights = (h @ block.mixer.memory.bank.T).softmax(-1)
    for t, token in enumerate(found):
        layer = token.layers[0]
        assert layer.gates == pytest.approx({"local": float(gates[t, :8].mean()), "static": float(gates[t, 8:].mean())}, rel=1e-4)
        assert layer.reads["static"].entropy_nats == pytest.approx(float(-(weights[t] * weights[t].log()).sum()), rel=1e-4)
        assert layer.reads["static"].slots[0] == (int(weights[t].argmax()), pytest.approx(float(weights[t].max()), rel=1e-4))
        assert layer.write_gate is None and not layer.sources


def test_learned_positions_are_read_in_pieces_that_start_anew():
    model = model_of(STATIC, positions="learned", max_position_embeddings=10)
    ids = torch.randint(31, (25,)).tolist()
    found = list(trace(model, ids, window=4))
    assert [each.index for each in found if each.surprise_nats is None] == [0, 10, 20]
    alone = list(trace(model, ids[10:20]))
    assert [each.surprise_nats for each in found[11:20]] == pytest.approx([each.surprise_nats for each in alone[1:]], rel=1e-4)


def test_records_are_flat_and_one_a_token_and_layer():
    flat = list(records(trace(model_of("gam-slots+gate_activation=sigmoid"), [1, 2, 3])))
    assert [(each["index"], each["layer"]) for each in flat] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {
        "surprise_nats",
        "gate_local",
        "gate_written",
        "added_local",
        "added_written",
        "added_feed_forward",
        "written_entropy_nats",
        "write_gate",
    } <= set(flat[0])
    assert all(not isinstance(value, dict) for each in flat for value in each.values())


def test_a_long_text_is_never_held_whole():
    model = model_of("gam-slots+gate_activation=sigmoid")
    ids = torch.randint(31, (1500,)).tolist()
    peaks = []
    for use in (lambda tokens: sum(1 for _ in tokens), lambda tokens: len(list(tokens))):
        tracemalloc.start()
        assert use(trace(model, ids, window=32)) == len(ids)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 0.15 * peaks[1]


def test_an_empty_text_is_named():
    with pytest.raises(InputError, match="text is empty"):
        next(trace(model_of(STATIC), []))


@pytest.mark.parametrize("name", [STATIC, "gam-mean", "gam-slots", "gam", "gam-slots+static_path=true"])
def test_a_silent_slot_is_as_if_it_were_not_there(name):
    mixer, x = mixer_of(name), inputs()
    for memory in mixer.slots():
        before = mixer(x)[0]
        mixer.silence(memory, 1)
        changed = mixer(x)[0]
        assert (changed - before).abs().max() > 1e-6
        bank = mixer.memory.bank if memory == "static" else mixer.written.bank.flatten(0, 1)
        with torch.no_grad():
            bank[1] += 3.0  # what a silent slot holds changes nothing
        same(mixer(x)[0], changed)
        mixer.silence(memory, None)
        with torch.no_grad():
            bank[1] -= 3.0
        same(mixer(x)[0], before)
    with pytest.raises(KeyError):
        mixer.silence("none", 0)


def test_a_silent_static_slot_leaves_the_paper_formula_over_the_others():
    mixer, x = mixer_of(GLOBAL), inputs()
    mixer.silence("static", 2)
    rest = torch.cat([mixer.memory.bank[:2], mixer.memory.bank[3:]])
    same(mixer(x)[0], (x @ rest.T).softmax(-1) @ rest)


def test_the_value_of_a_written_slot_is_what_it_adds_when_it_alone_is_read():
    mixer = mixer_of("gam-slots")
    written = mixer.written
    for slot in range(6):
        g = torch.zeros(2, 4, dtype=torch.float64)  # (H, E)
        g[slot // 3] = written.bank.flatten(0, 1)[slot]
        g = torch.nn.functional.rms_norm(g, (4,), eps=mixer.config.layer_norm_eps).flatten() * written.norm
        same(mixer.slots()["written"].value_SD[slot], written.out_proj(g))


@pytest.mark.parametrize("name", [name for name in mixer_names() if name != "gam"])
def test_a_mixer_without_slots_says_so(name):
    assert mixer_of(name).slots() == {} and set(mixer_of(name).trace(inputs()).paths) == {"mixer"}
