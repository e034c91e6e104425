"""Muon, the schedules, the average of the weights and the order of the documents, each against its formula."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import gam_lm.training.loop as loop
from gam_lm.checkpoint import load_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.training.averaging import Average
from gam_lm.training.batches import Batches, PermutedDocuments
from gam_lm.training.loop import fit, new_model, train_step
from gam_lm.training.muon import COEFFICIENTS, STEPS, Muon, orthogonalize
from gam_lm.training.optimizers import Together, hidden_matrices, make_optimizer, set_rate
from gam_lm.training.recipe import TrainConfig

RECIPE = TrainConfig(
    steps=14, batch_size=4, context=16, learning_rate=3e-3, warmup_steps=2, precision="fp32", validate_every=7, checkpoint_every=5, optimizer="muon",
    schedule="wsd", cooldown=0.5, ema=0.8, shuffle_documents=True,
)  # fmt: skip


def small_model(seed=0, **changes):
    sizes = {"vocab_size": 270, "hidden_size": 16, "num_hidden_layers": 2, "dropout": 0.1}
    return new_model(ModelConfig(**(sizes | changes)), seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    text = tmp_path / "text"
    text.mkdir()
    for split, count in (("train", 60), ("valid", 6)):
        documents = [{"text": " ".join(rng.choice(["alpha", "beta", "gamma", "delta"], rng.integers(5, 80)))} for _ in range(count)]
        (text / f"{split}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return prepare(str(text), vocab_size=270)


# Muon


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24), (3, 5, 9)])
def test_newton_schulz_keeps_the_singular_vectors_and_sends_each_singular_value_through_the_quintic(shape):
    g = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(g), u @ torch.diag_embed(s) @ vh, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 96)])
def test_orthogonalised_singular_values_are_near_one(shape):
    found = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert found.max() < 1.25
    assert (found > 0.65).float().mean() > 0.9  # the smallest of a square matrix may start below the reach of five steps


def test_every_cpu_orthogonalises_in_the_same_format(monkeypatch):
    monkeypatch.setattr("gam_lm.training.muon.has_bf16", lambda device: True)
    g = torch.randn(8, 5)
    assert orthogonalize(g).dtype == torch.float32 and orthogonalize(g.double()).dtype == torch.float64
    assert torch.equal(orthogonalize(g.bfloat16()), orthogonalize(g.bfloat16().float()))


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_takes_the_steps_of_pytorchs(shape, monkeypatch):
    original = torch.optim._muon._zeropower_via_newtonschulz

    def in_double(grad, coefficients, steps, eps):  # theirs rounds to bf16, which would hide a difference of a percent
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
            return original(grad, coefficients, steps, eps)

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", in_double)
    ours = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    mine = Muon([(ours, shape[:1])], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for _ in range(5):
        ours.grad = torch.randn(shape, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the coefficients are the same; theirs adds the norm's floor of 1e-7


def test_muon_is_near_pytorchs_bf16_steps():
    ours = nn.Parameter(torch.randn(32, 16))
    before, theirs = ours.detach().clone(), nn.Parameter(ours.detach().clone())
    ours.grad = torch.randn(32, 16)
    theirs.grad = ours.grad.clone()
    Muon([(ours, (32,))], lr=0.02).step()
    torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="original").step()
    assert (ours - theirs).norm() <= 0.03 * (ours - before).norm()


def test_a_fused_projection_moves_as_the_matrices_that_it_is_stacked_from():
    rows = (16, 16, 4, 40)
    fused = nn.Parameter(torch.randn(sum(rows), 16, dtype=torch.float64))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split(rows)]
    together, apart = Muon([(fused, rows)], weight_decay=0.3), Muon([(part, part.shape[:1]) for part in parts], weight_decay=0.3)
    for _ in range(3):
        fused.grad = torch.randn_like(fused)
        for part, gradient in zip(parts, fused.grad.split(rows), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]), rtol=1e-12, atol=1e-12)
    whole = nn.Parameter(torch.cat([part.detach() for part in parts]))
    whole.grad, fused.grad = torch.randn_like(fused), None
    fused.grad = whole.grad.clone()
    Muon([(whole, (len(whole),))]).step()
    Muon([(fused, rows)]).step()
    assert not torch.allclose(whole, fused, atol=1e-3)  # one block of all rows is another update


@pytest.mark.parametrize("rows", [(8, 9), (16, 0), (17,)])
def test_rows_that_do_not_make_up_a_matrix_are_refused(rows):
    with pytest.raises(InputError, match=r"rows do not make up a weight of shape \[16, 4\]"):
        Muon([(nn.Parameter(torch.zeros(16, 4)), rows)])


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    model = small_model()
    optimizer = make_optimizer(model, RECIPE)
    assert isinstance(optimizer, Together)
    muon, adamw = ({p for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert muon | adamw == set(model.parameters()) and not muon & adamw
    assert model.embed_tokens.weight in adamw and all(p.dim() == 2 for p in muon)
    assert {layer.mlp.up_proj.weight for layer in model.layers} | {layer.mlp.down_proj.weight for layer in model.layers} <= muon
    named = {parameter for layer in model.layers for parameter, _ in layer.mixer.matrices()}
    others = (p for module in model.modules() if not isinstance(module, nn.Linear) for p in module._parameters.values() if p is not None)
    assert all(p not in muon or p in named for p in others)
    untied = small_model(tie_word_embeddings=False)
    assert untied.lm_head.weight not in {p for p, _ in hidden_matrices(untied)}


def test_a_module_names_its_own_matrices_and_a_frozen_one_is_left_out():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection, self.other = nn.Linear(4, 12), nn.Linear(4, 4)

        def matrices(self):
            yield self.projection.weight, (4, 8)

    model = nn.Sequential(Fused(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    assert [(p is q, rows) for (p, rows), q in zip(hidden_matrices(model), (model[0].projection.weight, model[1].weight), strict=True)] == [
        (True, (4, 8)), (True, (4,)),
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_optimisers_shrink_a_weight_alike_and_spare_what_says_so(optimizer):
    model = nn.Module()
    model.hidden, model.spared, model.table = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Parameter(torch.ones(2, 3))
    model.kept = nn.Parameter(torch.ones(2, 3))
    model.kept.no_weight_decay = model.spared.weight.no_weight_decay = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = RECIPE.replace(optimizer=optimizer, learning_rate=0.01, weight_decay=0.5)
    made = make_optimizer(model, recipe)
    set_rate(made, 0.004)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for name, p in model.named_parameters():
        shrunk = 1.0 if getattr(p, "no_weight_decay", False) else 1 - 0.004 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * shrunk, rtol=1e-6, atol=0)


def test_the_schedule_scales_both_learning_rates():
    optimizer = make_optimizer(small_model(), RECIPE.replace(learning_rate=0.004, muon_learning_rate=0.03))
    set_rate(optimizer, 0.001)
    muon, adamw = optimizer.parts
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([0.0075] * 2)
    assert [group["lr"] for group in adamw.param_groups] == [0.001] * 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_with_either_optimiser_lowers_the_loss(optimizer):
    model = small_model(dropout=0.0)
    recipe = RECIPE.replace(optimizer=optimizer)
    made = make_optimizer(model, recipe)
    tokens = np.random.default_rng(0).integers(0, 20, (4, 17))
    losses = [float(train_step(model, made, (tokens[:, :-1], tokens[:, 1:]), recipe, 3e-3, torch.float32)[0]) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


# Schedule


def test_wsd_is_constant_after_the_warm_up_and_falls_in_a_line():
    recipe = TrainConfig(learning_rate=0.5, schedule="wsd", cooldown=0.25, warmup_steps=10)
    rates = [recipe.rate(step, 200) for step in range(200)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10:151] == [0.5] * 141
    assert rates[150:] == pytest.approx([0.5 * (50 - i) / 50 for i in range(50)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_every_step_has_a_learning_rate_above_zero_and_at_most_the_highest(schedule, total):
    recipe = TrainConfig(learning_rate=0.5, schedule=schedule, cooldown=0.1)
    rates = [recipe.rate(step, total) for step in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates) and max(rates) == 0.5


# The recipe


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("seed", -1, "at least 0"), ("betas", (0.9, 1.0), "below 1"), ("clip", math.inf, "finite"), ("clip", -1.0, "at least 0"),
        ("epochs", math.nan, "finite"), ("epochs", 0.0, "above 0"), ("batch_size", 0, "at least 1"), ("batch_size", 2.5, "whole number"),
        ("optimizer", "moun", "did you mean 'muon'"), ("steps", 0, "at least 1"), ("accumulate", 3, "use a divisor"), ("ema", 1.0, "below 1"),
        ("cooldown", 0.0, "above 0"), ("muon_learning_rate", 0.0, "above 0"), ("steps", 10**400, "at most"), ("shuffle_documents", 1, "true or false"),
        ("betas", (0.9,), "at least 2 of them"), ("betas", (0.9, 0.9, 0.9), "at most 2 of them"),
        ("weight_decay", math.nan, "finite"), ("warmup_steps", -1, "at least 0"), ("context", -5, "at least 1"), ("learning_rate", "1e-3", "a number"),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_one_line_with_field_and_fix(field, value, fix):
    with pytest.raises(InputError, match=fix) as caught:
        TrainConfig(**{field: value})
    assert field in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_survives_json_and_an_older_one_gets_the_defaults():
    assert TrainConfig.from_dict(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE
    old = {key: value for key, value in TrainConfig().to_dict().items() if key not in {"optimizer", "muon_learning_rate", "schedule", "cooldown", "ema"}}
    assert TrainConfig.from_dict(old) == TrainConfig(optimizer="adamw")  # a recipe of when there was no other
    with pytest.raises(InputError, match="did you mean 'steps'"):
        TrainConfig.from_dict({"stepz": 3})


# The average


def test_the_average_is_the_weighted_mean_of_the_weights_after_each_step():
    model, decay = nn.Linear(3, 2).double(), 0.7
    average, seen = Average(model, decay), []
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.normal_()
        seen.append(model.weight.detach().clone())
        average.update(step)
        powers = torch.tensor([decay ** (step - i) for i in range(1, step + 1)], dtype=torch.float64)
        expected = torch.einsum("i,imn->mn", powers, torch.stack(seen)) / powers.sum()
        torch.testing.assert_close(average.tensors["weight"], expected, rtol=1e-12, atol=1e-12)


def test_the_model_holds_the_average_for_a_while_and_gets_its_own_weights_back():
    model = small_model()
    own = weights(model)
    average = Average(model, 0.5)
    for tensor in average.tensors.values():
        tensor.add_(1.0)
    with average.in_place():
        assert torch.equal(weights(model), own + 1.0)
        assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(weights(model), own)


def test_a_run_validates_saves_and_returns_the_average_and_keeps_the_raw_weights(corpus, tmp_path):
    trail, recipe = [], RECIPE.replace(validate_every=None)
    original = loop.train_step

    def step(model, *arguments):
        result = original(model, *arguments)
        trail.append(weights(model).double())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        model = small_model()
        trained = fit(model, corpus, recipe, tmp_path / "run")
    powers = torch.tensor([recipe.ema ** (len(trail) - 1 - i) for i in range(len(trail))], dtype=torch.float64)
    expected = (powers[:, None] * torch.stack(trail)).sum(0) / powers.sum()
    torch.testing.assert_close(weights(model).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights(load_model(tmp_path / "run")), weights(model))
    assert loop.evaluate(model, corpus.splits["valid"], context=16).nats_per_token == trained.validation.nats_per_token
    from safetensors.torch import load_file

    (state,) = (tmp_path / "run" / "state").iterdir()
    raw = load_file(state / "model.safetensors")
    assert torch.equal(raw["embed_tokens.weight"].flatten().double(), trail[-1][: raw["embed_tokens.weight"].numel()])


# The order of the documents


def test_every_epoch_is_another_permutation_of_whole_documents():
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 50, rng.integers(0, 9)).tolist(), 0] for _ in range(40)]
    documents.append([7, 8])  # the last has no end
    ids = np.array([token for document in documents for token in document], dtype=np.uint16)
    view = PermutedDocuments(ids, 0, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        view.arrange(epoch)
        text = view[np.arange(len(view))].tolist()
        assert text == [token for document in view.order for token in documents[document]]
        assert sorted(view.order) == list(range(41))
        orders.append(view.order.tolist())
    assert orders[0] == orders[2] != orders[1] and len(view) == len(ids)


def test_shuffled_batches_are_blocks_of_the_permuted_text_whatever_was_asked_before(corpus):
    recipe = RECIPE.replace(batch_size=2)
    batches, again = Batches(corpus, recipe), Batches(corpus, recipe)
    steps = batches.steps_per_epoch
    epochs = [[batches.batch(epoch * steps + place) for place in range(steps)] for epoch in (0, 1)]
    end, ids = corpus.tokenizer.token_to_id("<|endoftext|>"), corpus.splits["train"].ids
    for epoch, found in enumerate(epochs):
        view = PermutedDocuments(ids, end, recipe.seed)
        view.arrange(epoch)
        text = view[np.arange(len(view))]
        blocks = {tuple(text[i : i + 17]) for i in range(0, len(text) - 16, 16)}
        assert all((*tokens, targets[-1]) in blocks for batch in found for tokens, targets in zip(*batch, strict=True))
    np.testing.assert_array_equal(again.batch(steps)[0], epochs[1][0][0])
    np.testing.assert_array_equal(again.batch(0)[0], epochs[0][0][0])
    plain = Batches(corpus, recipe.replace(shuffle_documents=False))
    assert plain.steps_per_epoch == steps and not np.array_equal(plain.batch(0)[0], epochs[0][0][0])


def test_documents_without_ends_cannot_be_shuffled(tmp_path):
    (tmp_path / "words").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "words" / f"{split}.txt").write_text("one two three four five\n" * 200)
    words = prepare(str(tmp_path / "words"), tokenizer="paper", vocab_size=30)
    with pytest.raises(InputError, match=r"shuffle_documents is True, tokenizer 'paper' has no"):
        Batches(words, RECIPE)


# All of it, killed


@pytest.mark.parametrize("killed_after", [3, 6, 8, 13])
def test_a_killed_run_with_muon_average_wsd_and_shuffle_goes_on_bit_by_bit(corpus, tmp_path, monkeypatch, killed_after):
    whole = small_model()
    expected = fit(whole, corpus, RECIPE, tmp_path / "whole")

    class Killed(Exception):
        pass

    original, count = loop.train_step, []

    def step(*arguments):
        if len(count) == killed_after:
            raise Killed
        count.append(1)
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(Killed):
        fit(small_model(), corpus, RECIPE, tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", original)
    again = small_model(seed=1)  # its own initial weights do not matter where there is a state, as after 6 steps
    if killed_after < 5:
        again = small_model()
    trained = fit(again, corpus, RECIPE, tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    assert [point["val_nats"] for point in trained.curve] == [point["val_nats"] for point in expected.curve]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    for file in (tmp_path / "whole" / "state" / "step-00000014").glob("*.safetensors"):
        if file.name != "generators.safetensors":  # another seed before, the same draws afterwards
            assert file.read_bytes() == (tmp_path / "run" / "state" / "step-00000014" / file.name).read_bytes()
