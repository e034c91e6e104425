"""`gam bench-gpu` without a GPU: every part in its dry mode, resumption, time that runs out, the page."""

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch

import gam_lm.experiments.gpu as gpu
import gam_lm.experiments.parity as parity
import gam_lm.experiments.training_speed as speed
from gam_lm.cli.main import run
from gam_lm.experiments.gpu import DRY, FULL, bench_gpu
from gam_lm.experiments.training_speed import matched
from gam_lm.inference.compiling import obstacle
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.model import count_parameters
from gam_lm.presets.models import named_model
from gam_lm.report.gpu import blocks_table, write_gpu
from gam_lm.results import Results

CPU = torch.device("cpu")
MACHINE = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}


@pytest.fixture
def opened(tmp_path):
    return lambda part: Results.open(tmp_path / part / "results.json", command="", environment=MACHINE, corpus=None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "matmul_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr("gam_lm.experiments.decode.memory_bandwidth", lambda device: 1e9)


@pytest.mark.slow
def test_every_part_is_measured_once_and_stands_on_the_page(tmp_path, opened, monkeypatch):
    assert bench_gpu(DRY, opened, CPU, seconds=600) == []
    rows = {part: opened(part).rows for part in ("parity", "table-2", "blocks", "training", "decode")}
    assert all(row.get("outcome", "ok") == "ok" for part in rows.values() for row in part)
    assert {row["model"] for row in rows["parity"]} == set(DRY.models) and all(row["within"] for row in rows["parity"])
    assert {(row["dtype"], row["sequence_length"]) for row in rows["table-2"]} == {(d, T) for d in ("fp32", "bf16") for T in DRY.lengths}
    assert {row["model_config"]["hidden_size"] for row in rows["training"]} == {16, 32} and len(rows["decode"]) == 2 * len(DRY.models)
    assert {(row["model"], row["sequence_length"], row["batch_size"]) for row in rows["blocks"]} == {(m, T, 64 // T) for m in DRY.blocks for T in (8, 32)}
    assert all(0 < row["output_error"] < 0.1 for row in rows["blocks"])
    assert {row["model"] for row in rows["blocks"] if 0 < row.get("state_error", 0) < 0.1} == {"gam-static", "gam", "transformer", "mamba"}
    page = write_gpu(tmp_path)
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## " + t for t in (
        "Parity with the fp64 reference", "Table 2: one block", "Blocks at equally many tokens", "Training", "Decoding")]  # fmt: skip
    for name in ("scaling.measure_block", "decode.measure_model", "parity._Pass", "training_speed._measure"):
        monkeypatch.setattr(f"gam_lm.experiments.{name}", None)
    assert bench_gpu(DRY, opened, CPU, seconds=600) == []  # nothing is left


def test_a_step_that_fails_is_said_and_the_others_are_taken(opened, monkeypatch, caplog):
    def broken(*arguments, **options):
        raise ZeroDivisionError("a kernel of ours")

    monkeypatch.setattr("gam_lm.experiments.scaling.measure_block", broken)
    failed = bench_gpu(dataclasses.replace(DRY, models=("gam-static",), blocks=("gam-static",)), opened, CPU, seconds=600)
    assert failed == [
        "Table 2 in fp32 of gam-static, transformer-learned+backend=materialised", "blocks at 8 tokens", "blocks at 32 tokens",
        "Table 2 in bf16 of gam-static, transformer-learned+backend=materialised",
    ]
    assert "a kernel of ours" in caplog.text and opened("decode").rows and not opened("table-2").rows


def test_when_time_is_up_what_is_missing_stays_missing(tmp_path, opened, caplog):
    assert bench_gpu(DRY, opened, CPU, seconds=0) == []
    assert sum("time is up" in message for message in caplog.messages) == 1
    assert all(opened(part).rows == [] for part in ("parity", "table-2", "blocks", "training", "decode"))
    assert write_gpu(tmp_path) == ""


def test_a_path_that_is_wrong_is_not_within(opened, monkeypatch):
    original = parity._Pass

    def wrong(config, dtype, device, *, compiled, packed=False):
        made = original(config, dtype, device, compiled=compiled, packed=packed)
        if dtype == torch.bfloat16 and config.options_of(GAMOptions).conv_kernel_size == 3 and next(calls) == 2:  # the trusted one comes first
            made.gradient = made.gradient * 1.5
        return made

    calls = iter(range(1, 100))
    monkeypatch.setattr(parity, "_Pass", wrong)
    parity.measure_parity(["gam-static"], DRY.base, opened("parity"), CPU, lambda: True)
    assert [(row["dtype"], row["within"]) for row in opened("parity").rows] == [("fp32", True), ("bf16", False)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look, which it hides where warnings are no errors
@pytest.mark.skipif(obstacle(CPU) is not None, reason="no compiler")
def test_the_compiled_block_is_within_the_reference(opened):
    parity.measure_parity(["gam-static"], DRY.base, opened("parity"), CPU, lambda: True, compiled_at=32)
    rows = {(row["dtype"], row["variant"]): row for row in opened("parity").rows}
    assert set(rows) == {(d, w) for d in ("fp32", "bf16") for w in ("eager", "compiled")} and all(row["within"] for row in rows.values())
    assert 0 < rows["fp32", "compiled"]["gradient_error"] < 1e-5 < rows["bf16", "compiled"]["gradient_error"]


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton here: pip install 'gam-lm[triton]'")
@pytest.mark.slow
@pytest.mark.parametrize("model", ["gam+backend=triton", "mamba+backend=triton"])
def test_the_kernel_is_within_the_reference_packed_rows_included(opened, monkeypatch, model):
    monkeypatch.setattr(parity, "PARITY_TOKENS", 20)  # the interpreter is slow
    parity.measure_parity([model], DRY.base, opened("parity"), CPU, lambda: True)
    rows = {(row["dtype"], row["variant"]): row for row in opened("parity").rows}
    assert set(rows) == {(d, w) for d in ("fp32", "bf16") for w in ("eager", "packed")}
    assert all(row["within"] for row in rows.values()) and rows["fp32", "eager"]["logits_error"] != rows["fp32", "packed"]["logits_error"]


def test_the_table_of_blocks_has_the_errors_and_the_fastest_in_bold():
    row = {"batch_size": 2, "dtype": "bf16", "outcome": "ok", "output_error": 0.00312}
    rows = [row | {"model": "gam", "sequence_length": 500, "forward_backward_ms": 3.0, "state_error": 0.001},
            row | {"model": "llama", "sequence_length": 500, "forward_backward_ms": 2.0},
            {"model": "gam", "sequence_length": 1000, "batch_size": 1, "dtype": "bf16", "outcome": "out of memory"}]  # fmt: skip
    lines = blocks_table({"environment": MACHINE, "rows": rows}).splitlines()
    assert [line for line in lines if line.startswith(("| gam", "| llama"))] == ["| gam | 3.00 (3e-03, 1e-03) | out of memory |", "| llama | **2.00** (3e-03) |  |"]


def test_the_sizes_are_those_that_are_promised():
    sizes = {name: count_parameters(config) for name, config in matched([m for m in FULL.models if not parity.on_kernel(m)], FULL.base).items()}
    assert all(abs(size - 22.5e6) < 0.05 * 22.5e6 for size in sizes.values())
    parameters, width = FULL.large
    for name in FULL.models:
        assert abs(count_parameters(gpu.enlarged(named_model(name, FULL.base), parameters, width)) - parameters) < 0.05 * parameters
    assert all(FULL.large_tokens % T == 0 for T in FULL.contexts) and min(FULL.contexts) == 512 and max(FULL.lengths) == 8192


def test_the_command_wants_a_gpu_or_to_be_dry(tmp_path, capsys, monkeypatch):
    assert run(["bench-gpu", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2 and "--dry" in capsys.readouterr().err
    monkeypatch.setattr("gam_lm.experiments.gpu.DRY", dataclasses.replace(DRY, models=("gam-static",), blocks=("gam-static",)))
    assert run(["bench-gpu", "--dry", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert "## Decoding" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "training" / "results.json").read_text())["rows"]
