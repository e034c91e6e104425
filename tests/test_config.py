"""What a configuration accepts, and what it says of what it does not."""

import dataclasses
import json
import subprocess
import sys

import pytest

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.attention_options import AttentionOptions
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.mixers.options import MixerOptions, default_heads
from gam_lm.mixers.registry import mixer_names, options_class
from gam_lm.model import LanguageModel
from gam_lm.presets.models import MODELS, changed, named_model
from gam_lm.presets.setups import PRESETS, preset
from gam_lm.training.recipe import TrainConfig


def test_a_config_survives_json():
    config = ModelConfig(
        vocab_size=100, mixers=("gam", "attention"), intermediate_size=12, options=(AttentionOptions(window=9), GAMOptions(write="mean", num_heads=8)),
    )  # fmt: skip
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.options_of(AttentionOptions).window == 9 and again.options_of(GAMOptions).write_address == "slots"


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
        ({"positions": "larned"}, "did you mean 'learned'"),
        ({"mixers": []}, "mixers is .*at least 1"),
        ({"mixers": "gam"}, "mixers is 'gam': use a list"),
        ({"mixers": ["gam", "atention"]}, "did you mean 'attention'"),
        ({"mixers": ["attention"], "hidden_size": 30, "options": {"attention": {"num_heads": 8}}}, "num_heads is 8, which does not divide hidden_size=30"),
        ({"mixers": ["attention"], "hidden_size": 24, "options": {"attention": {"num_heads": 8}}}, "even width per head"),
        ({"hidden_size": 30, "options": {"gam": {"num_heads": 8}}}, "num_heads is 8, which does not divide"),
        ({"options": {"gam": {"num_memory_slots": 30, "num_heads": 4}}}, "num_memory_slots is 30"),
        ({"options": {"gam": {"write": "mean", "conv_kernel_size": 1}}}, "conv_kernel_size is 1"),
        ({"options": {"gam": {"write": "mean", "fusion": "local"}}}, "fusion is 'local'"),
        ({"options": {"gam": {"write": "mean", "write_address": "keys"}}}, "write_address is 'keys'"),
        ({"options": {"gam": {"write": "mean", "max_write": 2.0}}}, "max_write is 2.0"),
        ({"options": {"gam": {"write": "none", "max_write": 2.0}}}, "max_write is 2.0 with write='none'"),
        ({"options": {"gam": {"write": "none", "write_address": "slots"}}}, "write_address is 'slots' with write='none'"),
        ({"options": {"gam": {"write": "none", "write_gate": "closed"}}}, "write_gate is 'closed' with write='none'"),
        ({"options": {"gam": {"write": "none", "static_path": True}}}, "static_path is True with write='none'"),
        ({"options": {"gam": {"memory": "attention", "static_path": True}}}, "static_path is True with memory='attention'"),
        ({"options": {"gam": {"memory": "attention", "write_address": "slots"}}}, "write_address is 'slots' with memory='attention'"),
        ({"options": {"gam": {"memory": "self_attention", "max_write": 2.0}}}, "max_write is 2.0 with memory='self_attention'"),
        ({"options": {"gam": {"memory": "self_attention", "write_gate": "closed"}}}, "write_gate is 'closed' with memory='self_attention'"),
        ({"options": {"gam": {"memory": "attention", "fusion": "local"}}}, "fusion is 'local'"),
        ({"options": {"gam": {"memory": "attention", "backend": "fla"}}}, "backend is 'fla'"),
        ({"options": {"gam": {"memory": "self_attention", "fusion": "local"}}}, "memory='self_attention', which is the global path"),
        ({"hidden_size": 24, "options": {"gam": {"memory": "self_attention", "num_heads": 8}}}, "needs an even width per head and finds 3"),
        ({"options": {"gam": {"keep_gate": True, "fusion": "sum"}}}, "keep_gate is True with fusion='sum'"),
        ({"options": {"gam": {"wriet": "mean"}}}, "option of mixer 'gam' 'wriet': did you mean 'write'"),
        ({"options": {"attention": {"window": 5}}}, "options has a AttentionOptions, and mixers is"),
        ({"options": {"attention": {"window": 0}}, "mixers": ["attention"]}, "window is 0"),
        ({"options": {"gam": 3}}, "options is no object of objects"),
        ({"options": [3]}, "options is no object of objects"),
        ({"mixers": ["mamba"], "options": {"mamba": {"expand": 1e-9}}}, "expand is 1e-09"),
        ({"mixers": ["gated_deltanet"], "options": {"gated_deltanet": {"expand_k": 0.0001}}}, "expand_k is 0.0001, which gives 0 channels"),
        ({"mixers": ["gated_deltanet"], "options": {"gated_deltanet": {"num_heads": 7}}}, "expand_k is 0.75, which gives 384 channels for num_heads=7"),
        ({"mixer": "gam"}, "gam-lm 0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ],
)
def test_a_value_that_cannot_be_built_is_named(change, words):
    with pytest.raises(InputError, match=words) as caught:
        ModelConfig.from_dict({"vocab_size": 10} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"write": "none"}, {"memory": "attention"}, {"memory": "self_attention"}])
def test_what_was_derived_for_a_written_bank_is_no_obstacle_to_another_memory(changes):
    resolved = ModelConfig(vocab_size=10).options_of(GAMOptions)
    assert resolved.write_address == "keys"
    config = ModelConfig(vocab_size=10, options=(resolved.replace(**changes),))
    assert config.options_of(GAMOptions).write_address is None and ModelConfig.from_dict(config.to_dict()) == config
    slots = named_model("gam-slots", {"vocab_size": 10})
    assert changed(slots, changes).options_of(GAMOptions).write_address is None


def test_heads_need_not_divide_a_width_that_has_none():
    LanguageModel(ModelConfig(vocab_size=10, hidden_size=30, num_hidden_layers=1, options=(GAMOptions(write="none", num_memory_slots=7, num_heads=8),)))


@pytest.mark.parametrize("name", mixer_names())
@pytest.mark.parametrize("hidden_size", [8, 16, 24, 64, 100, 256, 512, 768, 1024, 2048])
def test_the_default_options_fit_every_usual_width(name, hidden_size):
    ModelConfig(vocab_size=2, hidden_size=hidden_size, mixers=(name,))


@pytest.mark.parametrize(("hidden_size", "heads"), [(7, 1), (8, 4), (10, 1), (12, 3), (64, 4), (256, 4), (320, 5), (512, 8), (768, 12)])
def test_heads_by_default_are_of_even_width_and_at_most_64_where_the_width_allows_it(hidden_size, heads):
    assert default_heads(hidden_size) == heads
    assert hidden_size % heads == 0 and (heads == 1 or hidden_size // heads % 2 == 0)


def test_the_defaults_are_the_recommended_model_and_published_is_the_papers():
    gam, paper = ModelConfig(vocab_size=5), ModelConfig.published(vocab_size=5)
    assert gam == named_model("gam", {"vocab_size": 5})
    assert (gam.positions, gam.initialization, gam.dropout, gam.mixers) == ("none", "fan_in", 0.0, ("gam",))
    assert gam.options == (GAMOptions(num_heads=8, num_memory_slots=512, write_address="keys"),)
    assert (paper.positions, paper.initialization, paper.dropout) == ("learned", "paper", 0.1)
    assert paper.options[0].to_dict() | {"num_heads": None} == GAMOptions.published().to_dict()
    assert ModelConfig.published(vocab_size=5, hidden_size=64).hidden_size == 64


def test_options_of_mixers_that_are_gone_go_with_them():
    hybrid = ModelConfig(vocab_size=5, mixers=("gam", "attention"), options=(AttentionOptions(window=7), GAMOptions(write="mean")))
    assert [type(each) for each in hybrid.options] == [GAMOptions, AttentionOptions]  # in the order of the mixers, whatever was given
    alone = hybrid.replace(mixers=("attention",))
    assert alone.options == (hybrid.options_of(AttentionOptions),)
    with pytest.raises(KeyError):
        alone.options_of(GAMOptions)
    with pytest.raises(InputError, match="two AttentionOptions"):
        hybrid.replace(options=(AttentionOptions(), AttentionOptions()))


def test_the_feed_forward_network_has_its_usual_width_and_mamba_none():
    config = ModelConfig(vocab_size=5, hidden_size=48, mixers=("gam", "mamba"))
    gam, mamba = config.options
    assert [config.feed_forward_size(each) for each in (gam, mamba)] == [192, 0]
    assert config.replace(mlp="swiglu").feed_forward_size(gam) == 128
    assert [config.replace(intermediate_size=20).feed_forward_size(each) for each in (gam, mamba)] == [20, 20]
    assert config.replace(stack="bare").feed_forward_size(gam) == 0


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
    assert TrainConfig(learning_rate=1e-3, warmup_steps=100, paper_warmup=True).rate(4, 50) == pytest.approx(1e-3 * 5 / 100)


def test_every_named_model_can_be_built_from_every_preset():
    for setup in PRESETS.values():
        base = {**setup.model, "vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 32}
        for name in [*MODELS, *mixer_names()]:
            LanguageModel(named_model(name, base))


def test_a_name_takes_changes_after_plus_signs():
    base = {"vocab_size": 9, "hidden_size": 32, "options": {"gam": {"num_heads": 2}, "attention": {"num_heads": 4}}}
    found = named_model("gam-static+gate_activation=sigmoid+num_hidden_layers=3", base)
    options = found.options_of(GAMOptions)
    assert (options.write, options.gate_activation, options.num_heads, found.num_hidden_layers) == ("none", "sigmoid", 2, 3)
    hybrid = named_model("gam-hybrid+attention.window=7+window=9", base)
    assert hybrid.options_of(AttentionOptions).window == 9 and hybrid.options_of(AttentionOptions).num_heads == 4
    assert named_model("transformer-learned+backend=materialised", base).options_of(AttentionOptions).backend == "materialised"
    assert named_model("gam+static_path=true", base).options_of(GAMOptions).static_path is True
    assert named_model("attention", base).options_of(AttentionOptions) == named_model("transformer", base).options_of(AttentionOptions)
    for name, said in (
        ("gam-hybrid+num_heads=2", "fits several mixers: write gam.num_heads or attention.num_heads"), ("gam+writ=mean", "did you mean 'write'"),
        ("gam+window=3", "unknown field of gam 'window'"), ("gam+write", "write it as field=value"), ("gem", "did you mean 'gam'"),
        ("gam+vocab_size=3", "unknown field"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            named_model(name, base)


def test_where_to_write_follows_from_how():
    base = {"vocab_size": 9, "hidden_size": 32}
    assert changed(named_model("gam", base), {"write": "mean"}) == named_model("gam-mean", base)
    assert changed(named_model("gam-mean", base), {"write": "delta"}) == named_model("gam", base)
    assert changed(named_model("gam", base), {"write": "none"}) == named_model("gam-static", base)


@pytest.mark.parametrize("ask", [preset, lambda name: named_model(name, {"vocab_size": 3})])
def test_an_unknown_preset_or_model_is_named(ask):
    with pytest.raises(InputError, match="unknown (preset|model) 'nothing'"):
        ask("nothing")


def test_every_field_is_explained_where_it_stands():
    import ast
    import inspect

    for kind in (ModelConfig, TrainConfig, MixerOptions, *map(options_class, mixer_names())):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        explained = {
            a.target.id for a, b in zip(body, body[1:], strict=False)
            if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and "ClassVar" not in ast.unparse(a.annotation)
        }  # fmt: skip
        inherited = {field.name for base in kind.__mro__[1:] if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)}
        assert explained | inherited == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    "module",
    [
        "gam_lm", "gam_lm.config", "gam_lm.presets.models", "gam_lm.presets.setups", "gam_lm.mixers.registry", "gam_lm.results", "gam_lm.training.recipe",
        "gam_lm.report.page", "gam_lm.report.trace_page", "gam_lm.report.slots_page", "gam_lm.cli.main",
    ],
)
def test_the_ground_floor_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
