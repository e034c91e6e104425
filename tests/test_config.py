"""What a configuration accepts, and what it says of what it does not."""

import dataclasses
import json
import logging
import subprocess
import sys

import pytest

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.presets import MODELS, PRESETS, named_model, preset
from gam_lm.training.recipe import TrainConfig


def test_a_config_survives_json():
    config = ModelConfig(vocab_size=100, mixer="attention", positions="rotary", intermediate_size=12)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_bookkeeping_keys_of_hugging_face_are_passed_over():
    extra = {"model_type": "gam", "architectures": ["GAMForCausalLM"], "transformers_version": "5.0"}
    assert ModelConfig.from_dict({"vocab_size": 9} | extra) == ModelConfig(vocab_size=9)


def test_an_unknown_key_names_the_nearest_field():
    with pytest.raises(InputError, match="'hiden_size'.*did you mean 'hidden_size'"):
        ModelConfig.from_dict({"vocab_size": 9, "hiden_size": 8})
    with pytest.raises(InputError, match="'learning_rat'.*did you mean 'learning_rate'"):
        TrainConfig.from_dict({"learning_rat": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"positions": "rotory", "mixer": "attention"}, "did you mean 'rotary'"),
        ({"positions": "rotary"}, "attention"),
        ({"mixer": "attention", "hidden_size": 30}, "hidden_size is 30.*num_attention_heads=8 does not divide"),
        ({"mixer": "attention", "hidden_size": 24, "positions": "rotary"}, "even width per head"),
        ({"write": "delta", "hidden_size": 30}, "num_attention_heads=8 does not divide"),
        ({"write": "delta", "num_memory_slots": 30}, "num_memory_slots is 30"),
        ({"write": "mean", "conv_kernel_size": 1}, "conv_kernel_size is 1"),
        ({"write": "mean", "fusion": "local"}, "fusion is 'local'"),
        ({"write": "delta", "fusion": "global"}, "fusion is 'global'"),
        ({"keep_gate": True, "fusion": "sum"}, "keep_gate is True with fusion='sum'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ],
)
def test_a_value_that_cannot_be_built_is_named(change, words):
    with pytest.raises(InputError, match=words) as caught:
        ModelConfig(**({"vocab_size": 10} | change))
    assert "\n" not in str(caught.value)


def test_heads_need_not_divide_a_width_that_has_none():
    LanguageModel(ModelConfig(vocab_size=10, hidden_size=30, num_hidden_layers=1, num_memory_slots=7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 6, "accumulate": 4}, "accumulate is 4"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(change, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**change)


def test_the_rate_warms_up_and_falls_to_zero_along_a_cosine():
    recipe = TrainConfig(learning_rate=2.0, warmup_steps=10)
    rates = [recipe.rate(step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(1.0)
    assert rates[10] == 2.0 and all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and 0 < rates[-1] < 0.001
    assert TrainConfig(warmup_steps=100).rate(5, 50) == TrainConfig(warmup_steps=5).rate(5, 50)  # at most a tenth of the run
    assert TrainConfig(warmup_steps=100, paper_warmup=True).rate(4, 50) == pytest.approx(1e-3 * 5 / 100)


def test_every_named_model_can_be_built_from_every_preset():
    for setup in PRESETS.values():
        base = ModelConfig(vocab_size=300, **(dict(setup.model) | {"num_hidden_layers": 1, "hidden_size": 32, "num_memory_slots": 8}))
        for name in set(MODELS) - {"gam-mean", "gam-delta"}:
            LanguageModel(named_model(name, base))


@pytest.mark.parametrize("ask", [preset, lambda name: named_model(name, ModelConfig(vocab_size=3))])
def test_an_unknown_preset_or_model_is_named(ask):
    with pytest.raises(InputError, match="unknown (preset|model) 'nothing'"):
        ask("nothing")


def test_a_field_that_the_mixer_does_not_use_is_named_once(caplog):
    with caplog.at_level(logging.INFO, "gam_lm"):
        LanguageModel(ModelConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2, state_size=5, num_memory_slots=3))
        LanguageModel(ModelConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_memory_slots=3, fusion="sum", gate_activation="silu"))
    assert [r.getMessage() for r in caplog.records] == ["mixer 'gam' does not use state_size=5", "mixer 'gam' does not use gate_activation=silu"]


def test_every_field_is_explained_where_it_stands():
    import ast
    import inspect

    for kind in (ModelConfig, TrainConfig):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        explained = {a.target.id for a, b in zip(body, body[1:], strict=False) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
        assert explained == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    "module",
    [
        "gam_lm", "gam_lm.config", "gam_lm.presets", "gam_lm.results", "gam_lm.training.recipe", "gam_lm.report.page", "gam_lm.report.trace_page",
        "gam_lm.report.slots_page", "gam_lm.cli.main",
    ],
)
def test_the_ground_floor_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
