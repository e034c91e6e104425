"""Named models and setups: what `gam models` prints, what a plus sign changes, and that every name in a setup is one."""

import dataclasses
import re
import subprocess
import sys

import pytest

from gam_lm.cli.architecture import config_of_flags, model_on_flags
from gam_lm.cli.main import parse, run
from gam_lm.errors import InputError
from gam_lm.experiments.ablation import plan_ablation
from gam_lm.experiments.models import contender
from gam_lm.mixers.registry import mixer_names
from gam_lm.model import count_parameters
from gam_lm.presets.models import DEFAULT_MODEL, MODELS, SIZED_BY, changed, named_fields, named_model
from gam_lm.presets.setups import ABLATION, PRESETS, RECALL, SCALING, preset, recall_preset, scale_preset

BASE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4}
SETUPS = {**PRESETS, **RECALL, **SCALING}


def test_gam_models_prints_every_name_with_what_it_changes_and_its_source(capsys):
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("|")[1].strip(): [each.strip() for each in line.split("|")[2:-1]] for line in lines[2:]}
    assert set(cells) == set(MODELS)
    for name, (says, fields, source) in cells.items():
        assert (says, source) == (MODELS[name].says, MODELS[name].source) and says and source
        # What it prints is what it is: the fields, read as changes behind a mixer's name, give the same model.
        if fields:
            pattern = next(field.removeprefix("mixers=").split("-") for field in fields.split(", ") if field.startswith("mixers="))
            behind = "+".join(field for field in fields.split(", ") if not field.startswith("mixers=")).replace("=True", "=true").replace("=False", "=false")
            together = named_model("+".join(filter(None, ["gam", "mixers=" + str(pattern).replace("'", '"'), behind])), BASE)
            assert together == named_model(name, BASE), name


def test_the_list_is_quick():
    code = "import sys; from gam_lm.cli.main import run; run(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", [*MODELS, *mixer_names()])
def test_every_name_is_a_model_on_any_base(name):
    config = named_model(name, BASE)
    assert config == type(config).from_dict(config.to_dict()) and count_parameters(config) > 0
    crowded = BASE | {"options": {"gam": {"num_heads": 2}, "attention": {"num_heads": 8}, "mamba": {"state_size": 3}}}  # its own are taken, others left
    for each in named_model(name, crowded).options:
        assert getattr(each, "num_heads", None) in (None, 2, 8, 4) and getattr(each, "state_size", 3) == 3


def test_names_say_what_distinguishes_models():
    assert len({named_model(name, BASE) for name in MODELS}) == len(MODELS)
    assert DEFAULT_MODEL in MODELS and SIZED_BY in MODELS


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gam+write=none", "gam-static"), ("gam+write_address=slots", "gam-slots"), ("gam+write=mean", "gam-mean"), ("gam+gam.write=mean", "gam-mean"),
        ("gam+memory=attention", "gam-attention"), ("transformer+rotary=false+positions=learned", "transformer-learned"),
        ("transformer+qk_norm=true+mlp=swiglu+norm=rms", "llama"), ("gam-hybrid+mixers=attention+window=null", "transformer"),
        ("transformer+mixers=[\"gam\",\"gam\",\"gam\",\"attention\"]+window=128", "gam-hybrid"),
        ("gam-paper+positions=none+initialization=fan_in+gate_activation=silu", "gam-static"),
    ],
)  # fmt: skip
def test_changes_follow_a_plus_sign(name, same):
    assert named_model(name, BASE) == named_model(same, BASE)


def test_several_changes_are_all_made():
    config = named_model("gam-static+fusion=global+keep_gate=true+num_hidden_layers=2", BASE)
    (options,) = config.options
    assert (options.fusion, options.keep_gate, options.write, config.num_hidden_layers) == ("global", True, "none", 2)
    assert named_model("gam+fusion=global+keep_gate=true", BASE).options[0].keep_gate
    assert named_model("gam-hybrid+gam.conv_kernel_size=5", BASE).to_dict()["options"]["attention"]["conv_kernel_size"] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gma", "unknown model 'gma': did you mean 'gam'?"), ("gam-delta-keys-silu", "unknown model 'gam-delta-keys-silu'"), ("gam+", "write it as field=value"),
        ("gam+fusion", "'gam+fusion' has the change 'fusion': write it as field=value"), ("gam+fuson=sum", "did you mean 'fusion'?"),
        ("gam+fusion=smu", "did you mean 'sum'?"), ("gam+keep_gate=true", "keep_gate is True with fusion='gate'"), ("gam+write=none+num_heads=0", "num_heads is 0"),
        ("gam+fusion=local", "fusion is 'local'"), ("gam+num_heads=3", "num_heads is 3, which does not divide hidden_size=16"), ("gam+keep_gate=yes", "keep_gate is 'yes'"),
        ("transformer+write=mean", "unknown field of attention 'write'"), ("gam-hybrid+conv_kernel_size=5", "write gam.conv_kernel_size or attention.conv_kernel_size"),
        ("gam+mamba.expand=3", "unknown field of gam 'mamba.expand'"), ("gam+mixers=5", "mixers is 5"), ("gam+mixers=[\"gan\"]", "did you mean 'gam'?"),
        ("gam+vocab_size=5", "unknown field of gam 'vocab_size'"), ("gam+options={}", "unknown field of gam 'options'"), ("gam+dropout=1.5", "dropout is 1.5"),
        ("gam+dropout=NaN", "dropout is nan"), ("gam+hidden_size=\"16\"", "hidden_size is '16'"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_change_is_one_line(name, said, capsys):
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        named_model(name, BASE)
    assert "\n" not in str(raised.value)
    assert run(["train", "--data", "no-text", "--out", "nowhere", "--hidden-size", "16", "--model", name, "--device", "cpu"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("gam: ")]) == 1 and "Traceback" not in "\n".join(errors)


def test_where_to_write_follows_from_how_unless_it_is_said():
    gam = named_model("gam", BASE)
    assert changed(gam, {"write": "mean"}) == named_model("gam-mean", BASE)
    assert changed(changed(gam, {"write": "mean"}), {"write": "delta"}) == gam
    assert changed(gam, {"write_address": "slots"}) == named_model("gam-slots", BASE)


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_every_setup_names_models_that_can_be_built_at_its_size(setup):
    base = {"vocab_size": getattr(setup, "vocab_size", 10_000), **getattr(setup, "model", {})}
    for name in setup.models:
        assert count_parameters(contender(name, base, match=False)[1]) > 0


@pytest.mark.parametrize("setup", ABLATION.values(), ids=ABLATION)
def test_every_setup_of_the_ablation_starts_from_a_model_that_has_both_paths(setup):
    full = named_model(setup.full, {"vocab_size": setup.vocab_size, **setup.model})
    rows = plan_ablation(setup.models, setup.seeds, full, setup.train)
    assert {row.config for row in rows if row.name == "full"} == {full} and len({row.config for row in rows}) == len({row.name for row in rows})


def test_a_summary_is_a_command_that_is_understood():
    for setup in (*SETUPS.values(), *ABLATION.values()):
        assert parse(setup.summary.split(" · ")[0].split()[1:])


@pytest.mark.parametrize(("known", "wrong"), [(preset, "labtop"), (recall_preset, "minute"), (scale_preset, "cpus")])
def test_a_wrong_setup_is_named_with_the_nearest(known, wrong):
    with pytest.raises(InputError, match="did you mean"):
        known(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_flags_begin_at_the_named_model(name):
    assert config_of_flags(model_on_flags(name, BASE)) == named_model(name, BASE)
    assert dataclasses.is_dataclass(model_on_flags(name, BASE)) and named_fields(name, BASE)["vocab_size"] == 40
