"""The scaffold around the mixers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_names
from gam_lm.model import FeedForward, LanguageModel, make_norm
from gam_lm.ops.cross_entropy import CHUNK_TOKENS, cross_entropy, linear_cross_entropy, naive_cross_entropy

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}


STACKS = [(name,) for name in mixer_names()] + [tuple(mixer_names())]
every_stack = pytest.mark.parametrize("mixers", STACKS, ids="-".join)


def config_of(mixers=("gam",), options=None, **changes):
    sized = {"gam": {"num_heads": 2, "num_memory_slots": 8}, "attention": {"num_heads": 2}, "gated_deltanet": {"num_heads": 2}}
    options = {name: sized.get(name, {}) | (options or {}).get(name, {}) for name in mixers}
    return ModelConfig.from_dict(SIZES | changes | {"mixers": mixers, "options": options})


def model_of(**changes):
    return LanguageModel(config_of(**changes)).eval()


def test_the_loss_without_logits_is_the_loss_with_them():
    model, tokens = model_of().double(), torch.randint(50, (3, 11))
    targets = tokens.roll(-1, 1)
    targets[0, 3:] = -100
    logits, loss = model(tokens, targets)
    none, spared = model(tokens, targets, return_logits=False)
    assert none is None
    torch.testing.assert_close(spared, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100), rtol=1e-12, atol=0)


@pytest.mark.parametrize("N", [1, 7, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3])
def test_the_chunked_loss_equals_cross_entropy_with_its_gradients(N):
    h = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(9, (N,))
    target[1::3] = -100
    ours = torch.autograd.grad(3 * linear_cross_entropy(h, weight, target), (h, weight))
    theirs = torch.autograd.grad(3 * F.cross_entropy(h @ weight.T, target), (h, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_both_losses_are_the_mean_of_minus_log_softmax():
    h, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (30, 9))
    target = torch.randint(9, (30,))
    target[::4] = -100
    expected = naive_cross_entropy(h, weight, target)
    wanted = torch.autograd.grad(expected, (h, weight))
    for found in (linear_cross_entropy(h, weight, target), cross_entropy(h @ weight.T, target)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for ours, theirs in zip(torch.autograd.grad(found, (h, weight)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_batch_without_targets_has_loss_zero_and_no_gradient():
    model, tokens = model_of(), torch.randint(50, (1, 5))
    for return_logits in (True, False):
        _, loss = model(tokens, torch.full_like(tokens, -100), return_logits=return_logits)
        loss.backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("positions", ["learned", "none"])
@every_stack
def test_streaming_in_pieces_gives_the_logits_of_one_pass(mixers, positions):
    model, tokens = model_of(mixers=mixers, positions=positions).double(), torch.randint(50, (2, 17))
    whole, _ = model(tokens)
    state, pieces = None, []
    for piece in tokens.split([1, 5, 1, 10], dim=1):
        logits, state = model.stream(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    assert state.position_B.tolist() == [17, 17]


@every_stack
def test_a_left_padded_prompt_goes_on_as_the_prompt_alone(mixers):
    for positions, rotary in (("learned", True), ("none", True), ("learned", False)):
        model = model_of(mixers=mixers, positions=positions, options={"attention": {"rotary": rotary}}).double()
        short, long, more = torch.randint(50, (1, 4)), torch.randint(50, (1, 7)), torch.randint(50, (2, 3))
        tokens = torch.cat([F.pad(short, (3, 0)), long])
        segments = torch.cat([F.pad(torch.ones_like(short), (3, 0)), torch.ones_like(long)])
        logits, state = model.stream(tokens, segments=segments)
        after, _ = model.stream(more, state)
        for row, prompt in enumerate((short, long)):
            alone, _ = model(torch.cat([prompt, more[row : row + 1]], 1))
            ours = torch.cat([logits[row, -prompt.shape[1] :], after[row]])
            torch.testing.assert_close(ours, alone[0], rtol=1e-10, atol=1e-10)


def test_packed_sequences_have_the_loss_of_the_separate_ones():
    model = model_of().double()
    a, b = torch.randint(50, (1, 6)), torch.randint(50, (1, 9))
    packed, segments = torch.cat([a, b], 1), torch.tensor([[1] * 6 + [2] * 9])
    targets = packed.roll(-1, 1)
    targets[0, [5, 14]] = -100
    _, together = model(packed, targets, segments=segments)
    losses = [model(x[:, :-1], x[:, 1:])[1] * (x.shape[1] - 1) for x in (a, b)]
    torch.testing.assert_close(together, sum(losses) / 13, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("bad", "named"), [(50, "50"), (-1, "-1")])
def test_an_id_outside_the_vocabulary_is_named(bad, named):
    with pytest.raises(InputError, match=f"id {named}.*vocab_size is 50"):
        model_of()(torch.tensor([[1, bad]]))


def test_a_text_longer_than_the_positions_says_how_to_go_on():
    model = model_of(positions="learned", max_position_embeddings=8)
    with pytest.raises(InputError, match='the sequence.s length is 9, learned positions end at 8: use positions="none"'):
        model(torch.zeros(1, 9, dtype=torch.long))
    _, state = model.stream(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(InputError, match="length is 9"):
        model.stream(torch.zeros(1, 1, dtype=torch.long), state)
    model_of(max_position_embeddings=8)(torch.zeros(1, 30, dtype=torch.long))


def test_padding_needs_no_position():
    model = model_of(positions="learned", max_position_embeddings=8).double()
    tokens = torch.randint(50, (2, 11))
    alone, _ = model(tokens[:, :8])
    for start in (0, 3):  # padding on the right, and on both sides
        padded, segments = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
        padded[:, start : start + 8], segments[:, start : start + 8] = tokens[:, :8], 1
        logits, state = model.stream(padded, segments=segments)
        torch.testing.assert_close(logits[:, start : start + 8], alone, rtol=0, atol=1e-10)
        assert state.position_B.tolist() == [8, 8]
    model.stream(torch.zeros(2, 3, dtype=torch.long), state, segments=torch.zeros(2, 3, dtype=torch.long))  # also after the last position


@every_stack
@pytest.mark.parametrize(("B", "T"), [(0, 20), (0, 1), (2, 0), (0, 0)])
def test_a_batch_without_tokens_passes_through(mixers, B, T):
    model = model_of(mixers=mixers)
    for segments in (None, torch.ones(B, T, dtype=torch.long)):
        logits, state = model.stream(torch.zeros(B, T, dtype=torch.long), segments=segments)
        assert logits.shape == (B, T, 50)
        assert all(each.shape == start.shape for each, start in zip(state.layers[0], model.initial_state(B).layers[0], strict=True) if not T)
        for layer in model.layers:
            assert layer.mixer(torch.zeros(B, T, model.config.hidden_size), segments_BT=segments)[0].shape == (B, T, model.config.hidden_size)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", mixer_names())
def test_by_fan_in_every_projection_keeps_the_variance_of_its_input(name, mlp):
    sizes = {"vocab_size": 900, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "mlp": mlp, "mixers": (name,)}
    model = LanguageModel(ModelConfig(initialization="fan_in", positions="learned", **sizes))
    narrow = LanguageModel(ModelConfig(initialization="scaled", positions="learned", **sizes))
    checked = 0
    for (name, weight), other in zip(model.named_parameters(), narrow.parameters(), strict=True):
        if name.endswith(("proj.weight", "gate.weight", "address", "embed_tokens.weight", "embed_positions.weight")) and "dt_proj" not in name:
            depth = 2.0 if "out_proj" in name or "down_proj" in name else 1.0  # 1 / √(2 · 2 layers)
            for drawn, std in ((weight, weight.shape[1] ** -0.5), (other, 0.02)):
                assert abs(float(drawn.detach().std()) * depth / std - 1) < 6 / math.sqrt(2 * drawn.numel()), name  # six standard deviations
            checked += 1
    assert checked >= 2 + 2 * 4


def test_the_official_initialisation_has_the_official_statistics():
    model = LanguageModel(ModelConfig.published(vocab_size=4000, num_hidden_layers=1))
    D, M, K = 512, 512, 3
    own = dict(model.named_parameters())

    def uniform(name, bound):
        x = own[name]
        assert x.abs().max() <= bound and x.abs().max() > 0.95 * bound
        if x.numel() > 1e4:
            assert abs(float(x.detach().std()) / (bound / math.sqrt(3)) - 1) < 0.02 and abs(float(x.detach().mean())) < 0.02 * bound

    uniform("embed_tokens.weight", 1 / math.sqrt(D))  # the tie runs head → embedding
    uniform("layers.0.mixer.conv.weight", 1 / math.sqrt(K))
    uniform("layers.0.mixer.conv.bias", 1 / math.sqrt(K))
    uniform("layers.0.mixer.memory.bank", math.sqrt(6 / (M + D)))
    uniform("layers.0.mixer.gate.weight", 1 / math.sqrt(D))
    uniform("layers.0.mlp.up_proj.weight", 1 / math.sqrt(D))
    uniform("layers.0.mlp.down_proj.weight", 1 / math.sqrt(4 * D))
    assert abs(float(own["embed_positions.weight"].detach().std()) - 1) < 0.01
    # What that does: two different tokens at one position are nearly the same after the first norm.
    h = model.layers[0].mixer_norm(model.embed_tokens.weight[:200] + model.embed_positions.weight[0])
    similarity = F.cosine_similarity(h[:100], h[100:]).mean()
    assert similarity > 0.998


def test_the_scaled_initialisation_is_small_and_smaller_towards_the_residual():
    model = LanguageModel(ModelConfig(vocab_size=2000, num_hidden_layers=8, mixers=("attention",), initialization="scaled"))
    own = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.dim() == 2}
    for name, std in own.items():
        expected = 0.02 / math.sqrt(16) if name.endswith(("down_proj.weight", "out_proj.weight")) else 0.02
        assert abs(std / expected - 1) < 0.02, name


def test_every_fusion_is_what_its_name_says():
    for fusion in ("gate", "sum", "global", "local"):
        mixer = model_of(options={"gam": {"write": "none", "gate_activation": "sigmoid", "fusion": fusion}}).double().layers[0].mixer
        x = torch.randn(2, 9, 16, dtype=torch.float64)
        y, _ = mixer(x)
        expected = torch.zeros_like(x)
        local_gate = global_gate = torch.ones_like(x)
        if fusion == "gate":
            local_gate, global_gate = (F.linear(x, w, b).sigmoid() for w, b in zip(mixer.gate.weight.chunk(2), mixer.gate.bias.chunk(2), strict=True))
        if fusion != "global":
            conv = F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=16).transpose(1, 2)
            expected = expected + local_gate * conv
        if fusion != "local":
            bank = mixer.memory.bank
            expected = expected + global_gate * ((x @ bank.T).softmax(-1) @ bank)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_swiglu_and_gelu_networks_are_their_formulas():
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    swiglu, gelu = FeedForward(6, 10, "swiglu").double(), FeedForward(6, 10, "gelu").double()
    gate, up = x @ swiglu.gate_proj.weight.T, x @ swiglu.up_proj.weight.T
    torch.testing.assert_close(swiglu(x), (gate / (1 + (-gate).exp()) * up) @ swiglu.down_proj.weight.T, rtol=1e-12, atol=1e-12)
    assert not any(name.endswith("bias") for name, _ in swiglu.named_parameters())
    inner = x @ gelu.up_proj.weight.T + gelu.up_proj.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(gelu(x), inner @ gelu.down_proj.weight.T + gelu.down_proj.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_are_their_formulas(kind):
    norm, x = make_norm(config_of(norm=kind, layer_norm_eps=1e-3)).double(), 2 + torch.randn(3, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected + norm.bias if kind == "layer" else expected, rtol=1e-12, atol=1e-12)


def test_a_block_is_two_branches_beside_a_residual_each_behind_a_norm():
    block, x = model_of(mlp="swiglu", norm="rms").double().layers[0], torch.randn(2, 5, 16, dtype=torch.float64)
    middle = x + block.mixer(block.mixer_norm(x))[0]
    torch.testing.assert_close(block(x, None, None)[0], middle + block.mlp(block.mlp_norm(middle)), rtol=1e-12, atol=1e-12)


def test_a_pattern_of_mixers_repeats_over_the_depth():
    model = model_of(mixers=("gam", "mamba", "gam"), num_hidden_layers=7)
    assert model.config.layer_mixers == ("gam", "mamba", "gam", "gam", "mamba", "gam", "gam")
    assert [type(layer.mixer).__name__ for layer in model.layers] == ["GAMMixer", "Mamba", "GAMMixer"] * 2 + ["GAMMixer"]


def test_untied_heads_have_a_weight_of_their_own():
    tied, untied = model_of(), model_of(tie_word_embeddings=False)
    assert untied.count_parameters() - tied.count_parameters() == 50 * 16


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"mlp": "swiglu", "norm": "rms", "positions": "learned"}, {"initialization": "paper"}])
@every_stack
def test_a_model_from_the_meta_device_gets_its_initialisation_and_keeps_the_tie(mixers, changes):
    changes = changes | {"mixers": mixers}
    with torch.device("meta"):
        model = LanguageModel(config_of(**changes))
    model.to_empty(device="cpu")
    direct = model_of(**changes)
    for each in (model, direct):
        torch.manual_seed(0)
        each.init_weights()
    ours, theirs = dict(model.named_parameters()), dict(direct.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (model.lm_head.weight is model.embed_tokens.weight) is direct.config.tie_word_embeddings


def test_a_copy_is_its_own_and_keeps_the_tie():
    model, tokens = model_of(), torch.randint(50, (2, 9))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens)[0], model(tokens)[0])
    torch.nn.init.zeros_(twin.embed_tokens.weight)
    assert twin.lm_head.weight is twin.embed_tokens.weight
    assert not twin(tokens)[0].any() and model(tokens)[0].any()
