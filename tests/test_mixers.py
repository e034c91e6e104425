"""The contract that every mixer keeps: every registered one, their variants, and stacks of several."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_class, mixer_names, options_class
from gam_lm.model import LanguageModel, count_parameters
from gam_lm.presets.models import MODELS, named_model, on_base
from gam_lm.training.loop import new_model

SMALL = {"num_heads": 2, "num_memory_slots": 6, "chunk_size": 8, "state_size": 3, "expand_k": 1.0}
"""Sizes of a mixer, as far as it has such options."""

BASE = {
    "vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 2,
    "options": {name: {field.name: SMALL[field.name] for field in dataclasses.fields(options_class(name)) if field.name in SMALL} for name in mixer_names()},
}  # fmt: skip

OPTIONS = [
    "gam-static+conv_kernel_size=1", "gam-static+fusion=sum", "gam-static+fusion=global", "gam-static+fusion=local",
    "gam-static+fusion=global+keep_gate=true", "gam-static+fusion=local+keep_gate=true", "gam-static+gate_activation=sigmoid",
    "gam-mean+gate_activation=sigmoid", "gam-slots+gate_activation=sigmoid", "gam+conv_kernel_size=2+fusion=sum", "gam+write_gate=closed",
    "gam+static_path=true", "gam+max_write=2.0", "gam+fusion=global", "gam-attention+fusion=sum", "gam-attention+fusion=global+keep_gate=true",
    "gam-self-attention+fusion=sum", "gam-self-attention+fusion=global", "gam-self-attention+conv_kernel_size=1",
    "attention+rotary=false", "attention+backend=materialised", "attention+window=1", "attention+window=4", "attention+window=64",
    "attention+window=4+rotary=false+backend=materialised", "attention+conv_kernel_size=1", "attention+window=4+qk_norm=true+conv_kernel_size=3",
    "gated_deltanet+max_write=2.0+conv_kernel_size=1", "gated_deltanet+expand_k=2.0+expand_v=0.5", "mamba+expand=3.0",
]  # fmt: skip
"""What the options of a mixer change in it."""

EVERYTHING = "-".join(reversed(mixer_names()))
HYBRIDS = ["gam-hybrid+window=4", "gam-hybrid+window=64", EVERYTHING]
"""Three to one with a window smaller and larger than the texts here; and one layer of everything that is registered."""

VARIANTS = [*mixer_names(), *(name for name in MODELS if name not in mixer_names() and "hybrid" not in name), *OPTIONS]

every_mixer = pytest.mark.parametrize("name", VARIANTS)
every_stack = pytest.mark.parametrize("name", [*VARIANTS, *HYBRIDS])
kinds_and_hybrids = pytest.mark.parametrize("name", [*mixer_names(), HYBRIDS[0], EVERYTHING])


def config(name, **changes):
    options = {mixer: {key: changes.get(key, value) for key, value in each.items()} for mixer, each in BASE["options"].items()}
    base = BASE | {key: value for key, value in changes.items() if key not in SMALL} | {"options": options}
    if name == EVERYTHING:
        return on_base({"mixers": name.split("-"), "num_hidden_layers": len(mixer_names())}, base)
    return named_model(name, base | ({"num_hidden_layers": 4} if name in HYBRIDS else {}))


class Stack(nn.Module):
    """Several mixers one after the other, each behind a norm and beside a residual, called as one is."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mixers = nn.ModuleList(mixer_class(name)(config) for name in config.layer_mixers)

    def forward(self, x, state=None, *, segments_BT=None):
        parts, new = list(state or ()), []
        for mixer in self.mixers:
            count = len(mixer.initial_state(1))
            own = tuple(parts.pop(0) for _ in range(count)) if parts else None
            y, own = mixer(F.layer_norm(x, x.shape[-1:]), own, segments_BT=segments_BT)
            x, new = x + y, [*new, *own]
        return x, tuple(new)

    def initial_state(self, batch_size, **options):
        return tuple(part for mixer in self.mixers for part in mixer.initial_state(batch_size, **options))

    def init_weights(self):
        for mixer in self.mixers:
            mixer.init_weights()

    def cost(self, config, context):
        first, *others = (mixer.cost(config, context) for mixer in self.mixers)
        return sum(others, first)

    def matrices(self):
        return (each for mixer in self.mixers for each in mixer.matrices())


def mixer_of(name, **changes):
    """A mixer, or a stack of them, in float64 with weights large enough that every path matters."""
    torch.manual_seed(1)
    described = config(name, **changes)
    mixer = (Stack(described) if len(described.mixers) > 1 else mixer_class(described.mixers[0])(described)).double()
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def inputs(B=2, T=21, D=8):
    return torch.randn(B, T, D, dtype=torch.float64)


def same(a, b):
    assert a.shape == b.shape
    if not a.numel():
        return
    assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())


@pytest.mark.parametrize("name", ["gam", "gam-static+gate_activation=sigmoid", "gam-static+fusion=global+keep_gate=true", "gam-mean", "gam-slots", "gam-attention"])
def test_a_gate_starts_open(name):
    x_BTD = F.layer_norm(torch.randn(3, 50, 64), (64,))
    for initialization in ("scaled", "fan_in"):
        torch.manual_seed(1)
        mixer = mixer_class("gam")(config(name, hidden_size=64, initialization=initialization))
        mixer.init_weights()
        for gate in mixer.trace(x_BTD).gates.values():
            assert 0.4 < gate.mean() < 1 and (initialization == "fan_in" or (gate > 0).all())


@every_stack
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
def test_an_output_reaches_as_far_back_as_the_mixer_says(name):
    mixer, x = mixer_of(name), inputs(1).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[0][:, -1].sum(), x)
    reached = grad[0].abs().amax(-1) > 0
    reach = mixer.reach(mixer.config)
    assert reached[0] if reach is None else not reached[: max(0, 21 - reach)].any() and reached[-1]


@every_stack
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


@every_stack
def test_the_initial_state_equals_no_state(name):
    mixer, x = mixer_of(name), inputs()
    y, state = mixer(x, mixer.initial_state(2, dtype=torch.float64))
    expected, last = mixer(x)
    same(y, expected)
    for a, b in zip(state, last, strict=True):
        same(a.double(), b.double())


@every_stack
@pytest.mark.parametrize("T", [1, 3, 21, 40])
def test_the_state_has_the_size_that_cost_says(name, T):
    mixer, x = mixer_of(name).float(), inputs(3, T).float()
    _, state = mixer(x)
    assert all(len(part) == 3 for part in state)
    assert sum(part.numel() * part.element_size() for part in state) == 3 * mixer.cost(mixer.config, T).state_bytes
    if mixer.cost(mixer.config, T).state_bytes == mixer.cost(mixer.config, 10**6).state_bytes:  # one that does not grow has its size from the start
        assert [part.shape for part in state] == [part.shape for part in mixer.initial_state(3)]


@every_stack
def test_cost_counts_the_parameters(name):
    mixer = mixer_of(name)
    assert sum(p.numel() for p in mixer.parameters()) == mixer.cost(mixer.config, 16).parameters


@every_stack
def test_matrices_are_weights_of_the_mixer_each_once_whose_blocks_add_up(name):
    mixer = mixer_of(name)
    own, found = {id(p) for p in mixer.parameters()}, list(mixer.matrices())
    assert len({id(weight) for weight, _ in found}) == len(found) and {id(weight) for weight, _ in found} <= own
    for weight, rows in found:
        assert weight.dim() == 2 and sum(rows) == len(weight) and min(rows) > 0


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


@every_stack
def test_packed_and_padded_rows_equal_the_separate_sequences(name):
    mixer, x, more = mixer_of(name), inputs(B=4).requires_grad_(), inputs(B=4, T=6)
    y, state = mixer(x, segments_BT=PACKED)
    after, _ = mixer(more, state)
    assert y.isfinite().all()
    real = torch.zeros_like(y)
    for b, row in enumerate(PACKED):
        for places in sequences_of(row):
            alone, alone_state = mixer(x[b : b + 1, places])
            same(y[b, places], alone[0])
            real[b, places] = 1.0
        if not sequences_of(row):
            same(after[b], mixer(more[b : b + 1])[0][0])
            continue
        same(after[b], mixer(more[b : b + 1], alone_state)[0][0])
        if not any(part.dtype == torch.bool for part in state):  # what a cache has masked may be anything
            for part, alone_part in zip(state, alone_state, strict=True):
                same(part[b], alone_part[0])
    (y * real * torch.randn_like(y)).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[PACKED == 0] == 0).all()


@every_stack
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


@every_stack
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side_changes_nothing(name, side):
    """Rows of one batch with other lengths, as prompts come; windows are of tokens, not of places."""
    mixer, more = mixer_of(name), inputs(3, 9)
    texts, T = [inputs(1, n) for n in (2, 11, 17)], 19
    before = {"left": [T - 2, T - 11, T - 17], "right": [0, 0, 0], "both": [5, 4, 1]}[side]
    x, segments = inputs(3, T), torch.zeros(3, T, dtype=torch.long)
    for b, (text, start) in enumerate(zip(texts, before, strict=True)):
        x[b, start : start + text.shape[1]], segments[b, start : start + text.shape[1]] = text[0], 1
    y, state = mixer(x, segments_BT=segments)
    after, _ = mixer(more, state)
    for b, (text, start) in enumerate(zip(texts, before, strict=True)):
        alone = mixer(torch.cat([text, more[b : b + 1]], 1))[0][0]
        same(torch.cat([y[b, start : start + text.shape[1]], after[b]]), alone)


@every_stack
def test_gradients_equal_finite_differences(name):
    mixer = mixer_of(name, chunk_size=2, hidden_size=4)
    x = inputs(1, 5, 4).requires_grad_()
    parameters = {k: v.detach().requires_grad_() for k, v in mixer.named_parameters()}

    def output(x, *values):
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(output, (x, *parameters.values()), fast_mode=name in HYBRIDS)


@every_mixer
def test_the_paths_of_a_trace_add_up_to_the_output(name):
    mixer, x = mixer_of(name), inputs()
    same(sum(mixer.trace(x).paths.values()), mixer(x)[0])


def compiled_equals_eager(name, backend):
    torch._dynamo.reset()
    layers = {} if name in HYBRIDS else {"num_hidden_layers": 1}
    model = LanguageModel(config(name, chunk_size=4, **layers)).double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    tokens = torch.randint(31, (2, 10))  # two chunks and a half
    results = []
    for each in (compiled, model):
        results.append(each(tokens[:, :-1], tokens[:, 1:]))
        results[-1][1].backward()
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        same(ours.grad, theirs.grad) if theirs.grad is not None else None


@pytest.mark.parametrize("name", mixer_names())
def test_a_compiled_model_equals_eager(name):
    compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gam-mean", "gam-attention", "attention+window=4", HYBRIDS[0]])
def test_compiled_variants_equal_eager(name):
    compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*mixer_names(), "gam-static", "gam-mean"])
def test_a_model_compiled_by_inductor_equals_eager(name):
    compiled_equals_eager(name, "inductor")


@every_stack
def test_bf16_autocast_is_finite_and_near(name):
    model = LanguageModel(config(name))
    tokens = torch.randint(31, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert abs(loss - model(tokens[:, :-1], tokens[:, 1:])[1]) < 0.05


@every_stack
def test_weights_in_bf16_train_and_stream(name):
    model = LanguageModel(config(name))
    tokens = torch.randint(31, (2, 20))
    expected = model(tokens, tokens)[1].detach()
    model.bfloat16()
    loss = model(tokens, tokens)[1]
    loss.backward()
    assert abs(loss - expected) < 0.05 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        _, state = model.stream(tokens[:, :19])
        logits, _ = model.stream(tokens[:, 19:], state)
        assert (logits - model(tokens)[0][:, 19:]).abs().max() < 0.1


@every_stack
def test_a_model_is_built_without_memory_and_copied(name):
    with torch.device("meta"):
        model = LanguageModel(config(name))
    model.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    tokens = torch.randint(31, (1, 9))
    assert torch.equal(copy.deepcopy(model)(tokens)[0], model(tokens)[0])


PUBLISHED_SIZE = {"vocab_size": 10_000, "options": {"attention": {"num_heads": 8}, "gam": {"num_memory_slots": 512}}}
PUBLISHED = {
    "gam-paper": 22_599_680, "transformer-paper": 24_166_400, "mamba-paper": 20_504_576, "gam-paper+fusion=sum": 19_447_808,
    "gam-paper+fusion=global": 19_435_520, "gam-paper+fusion=local": 17_874_944,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert count_parameters(named_model(name, PUBLISHED_SIZE)) == PUBLISHED[name]
    if name == "gam-paper":
        assert count_parameters(ModelConfig.published(vocab_size=10_000)) == PUBLISHED[name]


def test_an_unknown_mixer_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'mamba'"):
        LanguageModel(ModelConfig(vocab_size=3, mixers=("mambo",)))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_part_of_a_new_model_has_a_gradient_that_leaves_nothing_of_the_others(name):
    """Clipping scales all gradients alike: a part whose own is 10¹² times as long would stop the others."""
    model = new_model(named_model(name, {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}), 0)
    tokens_BT = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    _, loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    lengths = [parameter.grad.norm() for parameter in model.parameters()]
    assert max(lengths) < 20 * torch.stack(lengths).median()
