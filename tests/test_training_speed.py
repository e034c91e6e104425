"""Training speed: every variant takes the same step, what a row says, runs that end badly, table and plot."""

import json

import pytest
import torch
from stacks import BASE as SMALL
from stacks import STACKS, stack

import gam_lm.experiments.training_speed as speed
from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import model_cost
from gam_lm.experiments.training_speed import Protocol, bench_train, make_step, matched
from gam_lm.ops.number_formats import trains_faster_in_bf16
from gam_lm.report.speed import speed_table, write_speed
from gam_lm.results import Results

BASE = SMALL | {"vocab_size": 64, "max_position_embeddings": 32}
CPU = torch.device("cpu")
TWO = (("plain", "fp32"), ("eager", "bf16"))


@pytest.fixture(autouse=True)
def bf16_is_measured(monkeypatch):
    """Also on a processor that only emulates it: times do not matter here."""
    monkeypatch.setattr("gam_lm.experiments.measuring.has_bf16", lambda device: True)


def opened(path):
    return Results.open(path / "results.json", command="", environment={}, corpus=None)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speed, "matmul_peak", lambda device, dtype: {torch.float32: 1e9, torch.bfloat16: 4e9}[dtype])


@pytest.mark.parametrize("name", ["gam-static", *STACKS])
def test_the_plain_step_takes_the_step_that_ours_takes(name):
    config = stack(name, BASE)
    plain, ours = (make_step(config, 3, 32, way, torch.float32, CPU) for way in ("plain", "eager"))
    losses = [(float(plain()), float(ours())) for _ in range(3)]
    assert all(a == pytest.approx(b, rel=2e-4) for a, b in losses) and losses[-1][0] < losses[0][0]


def test_a_row_says_what_was_measured_and_is_not_measured_twice(tmp_path, quick, monkeypatch):
    models = matched(["gam-hybrid", "mamba"], BASE)
    bench_train(models, [2, 4], 32, TWO, Protocol(rounds=2, warmup=1), opened(tmp_path), CPU, isolated=False)
    rows = opened(tmp_path).rows
    assert len(rows) == 8 and all(row["outcome"] == "ok" for row in rows)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1000 * 32 * row["batch_size"] / row["step_ms"])
        config = ModelConfig.from_dict(row["model_config"])
        assert row["flops_per_second"] == pytest.approx(row["tokens_per_second"] * model_cost(config, 32).training_flops)
        assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / {"fp32": 1e9, "bf16": 4e9}[row["dtype"]])
    errors = {(row["model"], row["batch_size"], row["dtype"]): (row["output_error"], row["state_error"]) for row in rows}
    for (name, batch, dtype), found in errors.items():
        assert all(0 < each < (1e-5 if dtype == "fp32" else 0.1) for each in found), (name, batch, dtype)
    monkeypatch.setattr(speed, "_measure", None)
    bench_train(models, [2, 4], 32, TWO, Protocol(rounds=2, warmup=1), opened(tmp_path), CPU, isolated=False)


@pytest.mark.slow
def test_running_out_of_time_is_a_row_and_the_memory_of_a_step_is_measured(tmp_path):
    bench_train(matched(["gam-mean"], BASE), [2], 32, TWO[:1], Protocol(limit_seconds=0.01), opened(tmp_path), CPU)
    bench_train(matched(["gam-mean"], BASE), [512], 32, TWO, Protocol(rounds=1, warmup=1), opened(tmp_path), CPU)
    late, plain, ours = opened(tmp_path).rows
    assert late["outcome"] == "over time" and "step_ms" not in late
    logits = 512 * 32 * 64 * 4 / 2**20
    assert plain["peak_memory_mb"] > 2 * logits and 0 < ours["peak_memory_mb"] < plain["peak_memory_mb"]


def test_what_gains_nothing_by_compiling_says_so_and_is_not_tried_again(tmp_path, quick, monkeypatch):
    variants = (("eager", "bf16"), ("compiled", "bf16"))
    bench_train(matched(["mamba"], BASE), [2], 32, variants, Protocol(rounds=1, warmup=1), opened(tmp_path), CPU, isolated=False)
    assert [(row["variant"], row["outcome"]) for row in opened(tmp_path).rows] == [("eager", "ok"), ("compiled", "nothing to compile")]
    monkeypatch.setattr(speed, "_measure", None)
    bench_train(matched(["mamba"], BASE), [2], 32, variants, Protocol(rounds=1, warmup=1), opened(tmp_path), CPU, isolated=False)


MACHINE = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}


def cell(model, variant, dtype, outcome="ok", **figures):
    row = {
        "model": model,
        "model_config": {"hidden_size": 512},
        "context": 256,
        "batch_size": 8,
        "dtype": dtype,
        "variant": variant,
        "outcome": outcome,
    }
    if outcome == "ok":
        row |= {"parameters": 1000, "tokens_per_second": 100.0, "flops_per_second": 5e9, "share_of_peak": 0.5, "peak_memory_mb": 200.0}
        row |= {"peak_fp32_flops": 1e10, "peak_bf16_flops": 2e10}
    return row | figures


def write_speed_of(rows, folder):
    (folder / "results.json").write_text(json.dumps({"command": "", "environment": MACHINE, "corpus": None, "rows": rows}))
    return write_speed(folder)


def test_table_and_plot_show_every_variant_over_the_plain_ones(tmp_path):
    rows = [cell("gam-static", "plain", "fp32"), cell("gam-static", "plain", "bf16", tokens_per_second=200.0)]
    rows += [cell("gam-static", "compiled", "bf16", tokens_per_second=300.0, peak_memory_mb=80.0), cell("mamba", "plain", "fp32", "out of memory")]
    (tmp_path / "results.json").write_text(json.dumps({"command": "", "environment": MACHINE, "corpus": None, "rows": rows}))
    table = write_speed(tmp_path)
    lines = [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert lines[4] == ["gam-static", "1,000", "compiled bf16", "300", "3.00", "1.50", "5", "50 %", "80.0", "0.40"]
    assert lines[5][2:4] == ["plain fp32", "out of memory"] and "bf16 20 GFLOP/s" in table
    picture = (tmp_path / "training_speed.svg").read_text()
    assert "gam-static, compiled bf16" in picture and "mamba" not in picture and (tmp_path / "training_speed.png").stat().st_size
    exact = write_speed_of([cell("gam", "plain", "fp32", output_error=3.1e-7, state_error=2e-6), cell("gam", "plain", "bf16", "over time")], tmp_path)
    assert "| 50 % | 3e-07, 2e-06 | 200 |" in exact and "Largest error against fp64" in exact and "Largest error" not in table
    assert speed_table({"environment": MACHINE, "rows": [*rows, cell("gam-static", "plain", "fp32") | {"batch_size": 32}]}).count("### ") == 2


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(tmp_path, capsys):
    sizes = ["--hidden-size", "16", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--vocab-size", "64", "--num-hidden-layers", "1"]
    command = [
        "bench-train", "--models", "gam-static", "--batch-sizes", "2", "--context", "16", "--variants", "eager", "--rounds", "2", "--warmup", "1",
        "--device", "cpu", "--out", str(tmp_path / "out"), *sizes,
    ]  # fmt: skip
    assert run(command) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    trained_in = "bf16" if trains_faster_in_bf16(torch.device("cpu")) else "fp32"
    assert (row["outcome"], row["variant"], row["dtype"]) == ("ok", "eager", trained_in) and "gam-static" in capsys.readouterr().out
    assert run([*command, "--rounds", "0"]) == 2
