"""Any architecture of transformers as a baseline, at the size of the library's own models."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from stacks import BASE
from test_cli import TINY, refused, text  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.experiments.models import CLOSE_ENOUGH, build, contender, state_bytes
from gam_lm.experiments.scaling import Protocol, scale
from gam_lm.hf import baselines
from gam_lm.hf.baselines import Baseline, BaselineBlock
from gam_lm.model import count_parameters
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.presets.models import named_model
from gam_lm.presets.setups import PRESETS
from gam_lm.report.plots import GREY, colour
from gam_lm.results import Results
from gam_lm.training.loop import fit
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trackers import NoTracker

CPU = torch.device("cpu")
NAMES = ["hf:llama", "hf:mamba2", "hf:lfm2", "hf:qwen3"]
SMALL = {**BASE, "vocab_size": 64}


@pytest.mark.parametrize("name", [*NAMES, "hf:gpt2", "hf:mamba", "hf:mistral", "hf:qwen3_next", "hf:gemma2"])
@pytest.mark.parametrize("setup", ["laptop", "small-cpu"])
def test_a_baseline_has_the_parameters_of_the_static_gam(name, setup):
    base = {"vocab_size": PRESETS[setup].vocab_size, **PRESETS[setup].model}
    row, config = contender(name, base, match=True)
    target = count_parameters(named_model("gam-static", base))
    assert row == name and (config.vocab_size, config.hidden_size) == (base["vocab_size"], base["hidden_size"])
    assert abs(baselines.count(config) - target) <= CLOSE_ENOUGH * target
    if setup == "laptop":
        model = build(config, 0, CPU)
        assert model.count_parameters() == baselines.count(config)
        assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("name", [*NAMES, "hf:gpt2"])
def test_by_fan_in_its_initialisation_is_as_large_as_that_of_our_own_models(name):
    base = SMALL | {"vocab_size": 1000, "hidden_size": 64}
    baselines_own, by_fan_in = (build(contender(name, base | {"initialization": each}, match=False)[1], 0, CPU) for each in ("scaled", "fan_in"))
    ours = build(named_model("transformer", base), 0, CPU)
    std = ours.embed_tokens.weight.std().item()
    assert by_fan_in.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.02)
    usual = type(baselines_own.network.config)().initializer_range
    assert baselines_own.embed_tokens.weight.std().item() == pytest.approx(usual, rel=0.02) and usual != pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_its_loss_is_the_one_that_transformers_finds(name):
    model = Baseline(contender(name, SMALL, match=False)[1])
    tokens = torch.randint(64, (3, 12))
    labels = tokens.clone()
    labels[0, 5:] = IGNORE
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORE)], 1)
    expected = model.network(input_ids=tokens, labels=labels).loss
    logits, loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, model.network(input_ids=tokens).logits)
    none, spared = model(tokens, targets, return_logits=False)
    assert none is None
    torch.testing.assert_close(spared, expected)
    with pytest.raises(InputError, match="whole sequences"):
        model.stream(tokens, model.stream(tokens)[1])


def test_its_initialisation_is_a_function_of_the_seed():
    config = contender("hf:qwen3", SMALL, match=True)[1]
    one, same, other = (dict(build(config, seed, CPU).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_its_state_is_what_transformers_caches():
    llama = contender("hf:llama", SMALL, match=True)[1]
    for tokens in (10, 40):
        assert state_bytes(llama, tokens) == 2 * llama.num_hidden_layers * llama.hidden_size * tokens * 4  # keys and values in fp32
    mamba2 = contender("hf:mamba2", SMALL, match=True)[1]
    assert state_bytes(mamba2, 10) == state_bytes(mamba2, 40) > 0


def test_a_scaled_output_head_is_made_plain_and_a_biased_one_is_refused():
    assert build(contender("hf:granite", SMALL, match=False)[1], 0, CPU).network.config.logits_scaling == 1
    with pytest.raises(InputError, match="more to its logits than one matrix"):
        build(contender("hf:phi", SMALL, match=False)[1], 0, CPU)


def test_bench_trains_baselines_on_the_same_tokens(text, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "bench"
    command = ["bench", "--data", str(text), "--models", "gam-static", *NAMES, "--steps", "3", "--initialization", "scaled", "--out", str(out), *TINY]
    assert run([*command, "--dry-run"]) == 0
    plan = {row["model"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert run(command) == 0
    rows = {row["model"]: row for row in json.loads((out / "results.json").read_text())["rows"] if not row.get("floor")}
    assert list(rows) == ["gam-static", *NAMES]
    for name in NAMES:
        row = rows[name]
        assert abs(row["parameters"] - rows["gam-static"]["parameters"]) <= CLOSE_ENOUGH * rows["gam-static"]["parameters"]
        assert row["parameters"] == plan[name]["parameters"] and row["train_tokens"] == rows["gam-static"]["train_tokens"]
        assert 0 < row["val_nats_per_token"] < 6 and row["state_bytes"] > 0
        assert row["backend"].startswith("transformers-") and row["transformers_config"]["model_type"] == name.removeprefix("hf:")
    assert {"hf:llama", "hf:mamba2"} <= set((out / "table.md").read_text().replace("|", " ").split())

    folder = out / "runs" / "hf-llama-seed0"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id is not None
    prompt = tokenizer("alpha", return_tensors="pt")
    assert theirs.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert "load it with transformers" in refused(capsys, ["eval", str(folder), "--data", str(text)])
    before = folder.joinpath("model.safetensors").stat().st_mtime_ns
    assert run(command) == 0  # nothing is left to do
    assert folder.joinpath("model.safetensors").stat().st_mtime_ns == before


class Interrupted(NoTracker):
    def log(self, figures, step):
        if step == 10:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_training_goes_on_as_the_same_run(text, tmp_path):  # noqa: F811
    corpus = prepare(str(text), vocab_size=270)
    config = contender("hf:lfm2", SMALL | {"vocab_size": corpus.vocab_size}, match=True)[1]
    recipe = TrainConfig(steps=14, batch_size=2, context=8, precision="fp32")
    whole, parts = build(config, 0, CPU), build(config, 0, CPU)
    expected = fit(whole, corpus, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(parts, corpus, recipe, tmp_path / "parts", tracker=Interrupted())
    again = build(config, 5, CPU)
    found = fit(again, corpus, recipe, tmp_path / "parts")
    assert found.validation.nats_per_token == expected.validation.nats_per_token
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_recall_trains_and_measures_baselines(tmp_path):
    sizes = ["--hidden-size", "16", "--num-hidden-layers", "2", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--vocab-size", "64"]
    task = ["--pairs", "2", "--length", "16", "--steps", "3", "--batch-size", "4", "--device", "cpu"]
    assert run(["recall", "--models", "gam", *NAMES, *task, *sizes, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["gam", *NAMES]
    assert all(0 <= row["accuracy"] <= 1 and row["answers"] == 2048 and row["state_bytes"] > 0 for row in rows)


def test_scale_measures_blocks_of_baselines(tmp_path):
    base = SMALL | {"hidden_size": 32}
    results = Results.open(tmp_path / "results.json", command="", environment={}, corpus=None)
    scale(["gam-static", *NAMES, "hf:gpt2"], [300], base, Protocol(warmup=1, iterations=1), results, CPU, isolated=False)
    rows = {row["model"]: row for row in results.rows}
    assert all(row["outcome"] == "ok" and row["forward_ms"] > 0 and row["model_config"]["hidden_size"] == 32 for row in rows.values())
    for name in ("hf:llama", "hf:qwen3", "hf:lfm2", "hf:gpt2"):
        assert rows[name]["parameters"] == pytest.approx(rows["gam-static"]["parameters"], rel=0.05)
    hybrid = ModelConfig.from_dict(rows["hf:lfm2"]["model_config"])
    assert baselines.period(hybrid) == 3  # two convolutions and an attention
    kinds = {type(part).__name__ for part in BaselineBlock(hybrid.replace(num_hidden_layers=3)).modules()}
    assert {"Lfm2ShortConv", "Lfm2Attention"} <= kinds


def test_baselines_have_colours_of_their_own():
    colours = [colour(name) for name in [*NAMES, "gam-static", "transformer", "mamba"]]
    assert len(set(colours)) == len(colours) and GREY not in colours


def test_an_unknown_type_is_one_line_with_the_nearest_name(text, tmp_path, capsys):  # noqa: F811
    for name, said in (("hf:lama", "did you mean 'llama'"), ("hf:bert-like", "unknown model type of transformers"), ("hf:gam", "unknown model type")):
        assert said in refused(capsys, ["bench", "--data", str(text), "--models", name, "--out", str(tmp_path / "out"), *TINY])


def test_without_transformers_the_pip_command_is_one_line(tmp_path):
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from gam_lm.cli.main import run\n"
        f"sys.exit(run(['scale', '--models', 'hf:llama', '--lengths', '16', '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "gam: model hf:llama needs transformers: pip install 'gam-lm[hf]'"
