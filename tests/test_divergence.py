"""Training that reaches numbers that are not finite says where, and keeps what was good."""

import json
import math

import numpy as np
import pytest
import torch

import gam_lm.training.loop as loop
from gam_lm.checkpoint import load_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.errors import DivergedError
from gam_lm.training.evaluate import Evaluation
from gam_lm.training.loop import fit, make_optimizer, new_model, train_step
from gam_lm.training.recipe import TrainConfig

RECIPE = TrainConfig(steps=14, batch_size=4, context=16, warmup_steps=2, precision="fp32", validate_every=7, checkpoint_every=5)


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for split, count in (("train", 3000), ("valid", 300)):
        (tmp_path / "text" / f"{split}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], count)) + "\n")
    return prepare(str(tmp_path / "text"), vocab_size=270)


def small_model(**changes):
    return new_model(ModelConfig(**({"vocab_size": 270, "hidden_size": 16, "num_hidden_layers": 2, "dropout": 0.1} | changes)), 0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch():
    tokens = np.random.default_rng(0).integers(0, 270, (2, 9))
    return tokens[:, :-1], tokens[:, 1:]


def at_step(number, change, monkeypatch):
    """Let ``change`` act on the model before the step of that number."""
    original, count = loop.train_step, []

    def step(model, *arguments):
        count.append(1)
        if len(count) == number:
            change(model)
        return original(model, *arguments)

    monkeypatch.setattr(loop, "train_step", step)


def overflow(module):
    """Finite weights, an output that is not."""
    module.register_forward_hook(lambda module, inputs, output: output * math.inf)


def test_the_layer_is_named_where_the_first_output_is_not_finite():
    model = small_model()
    overflow(model.layers[1].mlp.up_proj)
    before = weights(model)
    state = torch.get_rng_state()
    with pytest.raises(DivergedError, match="the loss is not finite, first in layers.1.mlp.up_proj, at learning rate 0.5") as caught:
        train_step(model, make_optimizer(model, RECIPE), batch(), RECIPE, 0.5, torch.float32)
    assert torch.equal(weights(model), before) and all(p.grad is None for p in model.parameters())
    torch.set_rng_state(state)
    with pytest.raises(DivergedError, match=str(caught.value)[:40]):
        train_step(model, make_optimizer(model, RECIPE), batch(), RECIPE, 0.5, torch.float32)


def test_a_gradient_alone_is_named_by_the_layer_that_it_reaches_first():
    model = small_model()
    model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(DivergedError, match="the gradient is not finite, first in the gradient of layers.1.mlp.up_proj.weight"):
        train_step(model, make_optimizer(model, RECIPE), batch(), RECIPE, 1e-3, torch.float32)


def test_a_broken_weight_is_named():
    model = small_model()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match="a weight is not finite, first in layers.1.mlp.down_proj.weight"):
        train_step(model, make_optimizer(model, RECIPE), batch(), RECIPE, 1e-3, torch.float32)


def test_a_diverged_run_keeps_the_last_finite_state_and_diverges_there_again(corpus, tmp_path, monkeypatch):
    good = {}

    def change(model):
        good["weights"] = weights(model)
        overflow(model.layers[0].mlp)

    with monkeypatch.context() as patch:
        at_step(9, change, patch)
        with pytest.raises(DivergedError, match="training diverged at step 9: the loss is not finite, first in layers.0.mlp, at learning rate 0.00528;") as caught:
            fit(small_model(), corpus, RECIPE, tmp_path / "run")
    assert caught.value.step == 8 and "\n" not in str(caught.value)
    assert torch.equal(weights(load_model(tmp_path / "run")), good["weights"])
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["step-00000008"]
    whole, again = small_model(), small_model()
    fit(whole, corpus, RECIPE, tmp_path / "whole")
    fit(again, corpus, RECIPE, tmp_path / "run")  # without what broke it, it is the run that it was: the diverged step left no trace
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_absurd_learning_rate_ends_in_divergence_and_every_file_stays_json(corpus, tmp_path, optimizer):
    recipe = RECIPE.replace(learning_rate=1e30, muon_learning_rate=1e30, optimizer=optimizer, validate_every=1, checkpoint_every=1, ema=0.5)
    with pytest.raises(DivergedError, match="training diverged at step"):
        fit(small_model(), corpus, recipe, tmp_path / "run")

    def refuse(constant):
        raise AssertionError(constant)

    for path in (tmp_path / "run").rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


def test_weights_that_a_step_broke_never_replace_good_ones(corpus, tmp_path, monkeypatch):
    original, kept = loop.train_step, []

    def step(model, *arguments):
        result = original(model, *arguments)
        kept.append(weights(model))
        if len(kept) == 7:  # just before the validation and the state that follows it
            with torch.no_grad():
                model.norm.weight[3] = math.inf
        return result

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(DivergedError, match=r"at step 7: a weight is not finite, first in norm.weight"):
        fit(small_model(), corpus, RECIPE, tmp_path / "run")
    assert torch.equal(weights(load_model(tmp_path / "run")), kept[4])  # the state of step 5


def test_the_command_exits_with_3_and_one_line(capsys, monkeypatch):
    from gam_lm.cli import main

    class Verb:
        def run(self):
            raise DivergedError("the loss", "layers.0.mixer", 0.25, 11)

    monkeypatch.setattr(main, "parse", lambda arguments: [Verb()])
    assert main.run(["train"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("gam: training diverged at step 12: the loss is not finite, first in layers.0.mixer, at learning rate 0.25; use")
    assert error.count("\n") == 1


def test_perplexities_beyond_a_float_are_the_largest_that_is_written():
    figures = Evaluation(
        block_nats=np.array([1e6]), block_tokens=np.array([10]), batch_means=np.array([1e5]), position_nats=np.array([1e5]), targets=10, bytes=10, words=2
    ).figures("val")
    assert all(math.isfinite(value) for value in figures.values()) and figures["val_ppl"] == math.exp(700.0)
