"""Table 2: cells that end well and cells that do not, resumption, the fitted exponents, table and plots."""

import itertools
import json
import math
import mmap
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from stacks import BASE as SMALL
from stacks import on

import gam_lm.experiments.scaling as scaling
from gam_lm.cli.architecture import fields_of
from gam_lm.cli.main import parse, run
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.experiments.gpu import MATERIALISED
from gam_lm.experiments.models import build_blocks
from gam_lm.experiments.scaling import Protocol, scale
from gam_lm.mixers.attention_options import AttentionOptions
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.model import LanguageModel
from gam_lm.presets.models import named_model
from gam_lm.report.plots import Lines, label_ends, new_figure
from gam_lm.report.scaling import fit_exponent, scaling_brief, scaling_table, write_scaling
from gam_lm.results import Results
from gam_lm.runtime import measure
from gam_lm.runtime.isolation import resident_bytes, run_isolated

BASE = SMALL | {"vocab_size": 64}

PROBE = """
import os, time
from gam_lm.errors import InputError

def take(parameters, peak):
    held = []
    def step():
        held.append(b"x" * parameters["bytes"])
        held.clear()
    return {"bytes": peak(step)}

def hoard(parameters, peak):
    held = []
    while True:
        held.append(b"x" * 2**24)

def sleep(parameters, peak):
    time.sleep(60)

def tell(parameters, peak):
    open(parameters["file"], "w").write(str(os.getpid()))
    time.sleep(60)

def refuse(parameters, peak):
    raise InputError("length is 3: use 4")

def fail(parameters, peak):
    raise KeyError("a bug")
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Functions without torch, which a new process starts in a moment."""
    (tmp_path / "probe.py").write_text(PROBE)

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))

    def call(name, parameters=None, **limits):
        return run_isolated(f"probe:{name}", parameters or {}, **({"seconds": 30, "memory_mb": 2000} | limits))

    return call


@pytest.mark.parametrize("megabytes", [8, 100])
def test_the_peak_is_what_a_step_takes_even_if_it_gives_it_back(probe, megabytes):
    done = probe("take", {"bytes": megabytes * 2**20})
    assert done.outcome == "ok"
    assert abs(done.figures["bytes"] - megabytes * 2**20) < 3 * 2**20


def test_a_process_over_its_memory_limit_is_a_result(probe):
    assert probe("hoard", memory_mb=200).outcome == "out of memory"


def test_a_process_over_its_time_limit_is_a_result(probe):
    assert probe("sleep", seconds=0.2).outcome == "over time"


def test_a_process_ends_with_the_one_that_started_it(probe, tmp_path):
    file = tmp_path / "pid"
    call = f"from gam_lm.runtime.isolation import run_isolated; run_isolated('probe:tell', {{'file': {str(file)!r}}}, seconds=60, memory_mb=2000)"
    parent = subprocess.Popen([sys.executable, "-c", call])
    eventually(lambda: file.exists() and file.read_text())
    child = int(file.read_text())
    assert resident_bytes(child)
    parent.kill()
    parent.wait()
    eventually(lambda: not resident_bytes(child))


def eventually(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_users_error_and_our_own_are_told_apart(probe, capfd):
    with pytest.raises(InputError, match="length is 3"):
        probe("refuse")
    with pytest.raises(RuntimeError, match="status 1"):
        probe("fail")
    assert "KeyError: 'a bug'" in capfd.readouterr().err


def test_running_out_of_memory_or_time_is_a_row_and_the_analysis_goes_on(tmp_path):
    results = Results.open(tmp_path / "results.json", command="", environment={}, corpus=None)
    base = on(BASE, options={"gam": {"num_heads": 16, "num_memory_slots": 16}, "attention": {"num_heads": 16}})
    quick = {"warmup": 1, "iterations": 1}
    # 16 heads × 8,192² scores in fp32 are 4 GB.
    scale([MATERIALISED], [8192], base, Protocol(limit_mb=1000, **quick), results, scaling.torch.device("cpu"))
    scale(["gam-mean"], [65_536], base, Protocol(limit_seconds=0.05, **quick), results, scaling.torch.device("cpu"))
    scale(["gam-static"], [8192], base, Protocol(limit_mb=1000, **quick), results, scaling.torch.device("cpu"))
    materialised, late, static = results.rows
    assert (materialised["outcome"], late["outcome"], static["outcome"]) == ("out of memory", "over time", "ok")
    assert "forward_ms" not in materialised and static["forward_backward_ms"] > 0
    # A block of width 16 keeps some hundred numbers per token; its input's gradient is the least.
    assert 8192 * 16 * 4 < static["peak_memory_mb"] * 2**20 < 8192 * 16 * 4 * 100


def test_an_interrupted_analysis_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    measured = []
    original = scaling.measure_block

    def counted(parameters, peak):
        measured.append((parameters["model"], parameters["sequence_length"]))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(parameters, peak)

    monkeypatch.setattr(scaling, "measure_block", counted)

    def analyse(lengths, protocol):
        results = Results.open(tmp_path / "results.json", command="", environment={}, corpus=None)
        scale(["gam-static", "transformer"], lengths, BASE, protocol, results, scaling.torch.device("cpu"), isolated=False)
        return results.rows

    protocol = Protocol(warmup=1, iterations=2)
    with pytest.raises(KeyboardInterrupt):
        analyse([32, 16], protocol)
    rows = analyse([32, 16], protocol)
    # All models of one length back to back, the shortest first; what was measured is not measured again.
    assert measured == [("gam-static", 16), ("transformer", 16), ("gam-static", 32), ("gam-static", 32), ("transformer", 32)]
    assert all(row["outcome"] == "ok" and row["passes"] == 2 and row["forward_ms"] > 0 for row in rows)
    assert len(analyse([16], Protocol(warmup=1, iterations=2, batch_size=3))) == 6  # another batch size is another row


def test_a_hybrid_is_measured_over_one_turn_of_its_layers(tmp_path):
    results = Results.open(tmp_path / "results.json", command="", environment={}, corpus=None)
    scale(["gam-hybrid+window=8", "gam", "transformer"], [32], BASE, Protocol(warmup=1, iterations=1), results, torch.device("cpu"), isolated=False)
    rows = {row["model"]: row for row in results.rows}
    config = ModelConfig.from_dict(rows["gam-hybrid+window=8"]["model_config"])
    turn, blocks = build_blocks(config, 32)
    assert blocks == 4 and [type(layer.mixer).__name__ for layer in turn.layers] == ["GAMMixer"] * 3 + ["Attention"]
    own, gam, attention = (rows[name]["parameters"] for name in ("gam-hybrid+window=8", "gam", "transformer"))
    assert own == (3 * gam + attention) // 4  # the mean of a turn
    x_BTD, whole = torch.randn(2, 32, 16), LanguageModel(config.replace(num_hidden_layers=4))
    turn.load_state_dict(whole.state_dict(), strict=False)
    expected = x_BTD
    for layer in whole.layers:
        expected, _ = layer(expected, None, None)
    assert torch.equal(turn(x_BTD, None, None)[0], expected)


def test_the_exponent_and_its_interval_are_those_of_least_squares():
    lengths = np.array([1024, 2048, 4096, 8192, 16_384])
    exact = fit_exponent(lengths, 3 * lengths**1.5)
    assert exact.value == pytest.approx(1.5) and exact.half_width < 1e-9
    noisy = 2.0 * lengths * np.array([1.1, 0.9, 1.05, 0.97, 1.0])
    (slope, _), covariance = np.polyfit(np.log(lengths), np.log(noisy), 1, cov=True)
    fitted = fit_exponent(lengths, noisy)
    assert fitted.value == pytest.approx(slope)
    assert fitted.half_width == pytest.approx(3.182446305 * math.sqrt(covariance[0, 0]), rel=1e-6)  # Student's t, 3 degrees of freedom
    assert fit_exponent([1024], [1.0]) is None


def cell(model, T, outcome="ok", **figures):
    row = {"model": model, "sequence_length": T, "batch_size": 1, "dtype": "fp32", "variant": "eager", "outcome": outcome}
    if outcome == "ok":
        row |= {"parameters": 1000, "forward_ms": T / 4000, "forward_backward_ms": T / 1000, "peak_memory_mb": T / 100}
    return row | figures


MACHINE = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}


def test_table_and_plots_show_every_model_and_what_failed(tmp_path):
    lengths = [1024, 4096, 16_384, 65_536]
    rows = [cell("gam-static", T) for T in lengths]
    rows += [cell(MATERIALISED, T, forward_backward_ms=T * T / 1e6) for T in lengths[:2]]
    rows += [cell(MATERIALISED, 16_384, "out of memory"), cell(MATERIALISED, 65_536, "over time")]
    content = {"command": "", "environment": MACHINE, "corpus": None, "rows": rows}
    (tmp_path / "results.json").write_text(json.dumps(content))
    table = write_scaling(tmp_path)
    lines = [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["Length"] + [f"{model} {figure}" for model in ("gam-static", MATERIALISED) for figure in ("time (ms)", "memory (MB)")]
    assert lines[2] == ["1,024", "1.02", "10.2", "1.05", "10.2"]
    assert lines[4] == ["16,384", "16.4", "164", "out of memory", ""] and "over time" in lines[5]
    exponents = {line[0]: line for line in lines if line[0] in ("gam-static", MATERIALISED)}
    assert exponents["gam-static"][2:5] == ["1.00 ± 0.00", "1.00 ± 0.00", "1.00"]
    assert exponents[MATERIALISED][2] == "2.00" and exponents[MATERIALISED][5] == "4,096"
    picture = (tmp_path / "compute_time.svg").read_text()
    assert "gam-static" in picture and "transformer-learned+backend=materialised (out of memory)" in picture
    assert all((tmp_path / f"{stem}.{end}").stat().st_size for stem in ("compute_time", "peak_memory") for end in ("svg", "png"))


def test_rows_of_different_settings_are_never_in_one_table():
    rows = [cell("gam-static", 1024), cell("gam-static", 1024, dtype="bf16", forward_backward_ms=0.5)]
    table = scaling_table({"environment": MACHINE, "rows": rows})
    assert table.count("### Forward and backward pass: batch 1, ") == 2 and "batch 1, bf16 autocast, eager" in table


def test_the_brief_table_has_a_row_for_each_model():
    rows = [cell("gam-static", T) for T in (1024, 8192, 65_536)] + [cell("transformer", 1024), cell("transformer", 8192, "over time")]
    lines = [[each.strip() for each in line.strip("|").split("|")] for line in scaling_brief({"environment": MACHINE, "rows": rows}).splitlines()]
    assert lines[2] == ["gam-static", "1.00", "1.00", "1.00", "1.00 ± 0.00", "1.00 ± 0.00", "65,536"]
    assert lines[3] == ["transformer", "1.00", "over time", "", "", "", "1,024"]


def test_the_papers_protocol_is_a_preset():
    (verb,) = parse(["scale", "--preset", "table-2", "--out", "x"])
    assert (verb.batch_size, verb.precision, verb.warmup, verb.iterations) == (16, "fp16", 5, 20)
    assert verb.lengths == (256, 512, 1024, 2048, 4096, 8192)
    base = fields_of(verb.architecture)
    assert (
        base["hidden_size"],
        named_model("gam", base).options_of(GAMOptions).num_heads,
        named_model("gam", base).options_of(GAMOptions).num_memory_slots,
    ) == (512, 8, 512)
    assert named_model("transformer", base).options_of(AttentionOptions).num_heads == 8
    assert {MATERIALISED, "transformer", "gam-static", "gam-mean", "gam-slots", "mamba"} <= set(verb.models)


def test_scale_measures_in_processes_of_their_own(tmp_path, capsys):
    sizes = ["--hidden-size", "16", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--iterations", "1", "--warmup", "1"]
    command = ["scale", "--models", "gam-static", "--lengths", "16", "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "out"), *sizes]
    assert run(command) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["outcome"] == "ok" and row["peak_memory_mb"] >= 0 and "gam-static" in capsys.readouterr().out
    assert run([*command, "--lengths", "0"]) == 2


@pytest.mark.parametrize("scale_of_y", ["linear", "log"])
def test_the_names_of_lines_keep_their_distance(scale_of_y):
    _, axes = new_figure()
    axes.plot([1, 2], [1.0, 1000.0])
    axes.set_yscale(scale_of_y)
    heights = [1.0, 1.01, 1.02, 900.0]
    label_ends(axes, [(2.0, height, str(height), "black") for height in heights])
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted(float(to_axes.transform((1.0, text.xyann[1]))[1]) for text in axes.texts)
    assert all(above - below > 0.04 for below, above in itertools.pairwise(places)) and places[0] >= 0 and places[-1] <= 1
    assert abs(places[0] - float(to_axes.transform((1.0, 1.0))[1])) < 1e-6  # the lowest stands at its line's end


def test_lines_of_one_colour_are_told_apart():
    _, axes = new_figure()
    lines = Lines(axes)
    for name in ("gam-static", "gam-static+fusion=sum", "gam-static+fusion=local", "mamba"):
        lines.add(name, {1.0: 1.0, 2.0: 3.0})
    lines.name()
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()]
    assert len({colour for colour, _, _ in styles[:3]}) == 1 and len({marker for _, _, marker in styles[:3]}) == 3
    assert styles[0][1:] == styles[3][1:]  # another colour begins anew
    assert [text.get_text() for text in axes.texts] == ["gam-static", "gam-static+fusion=sum", "gam-static+fusion=local", "mamba"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell page faults")
def test_a_warm_up_goes_on_while_the_process_asks_for_memory():
    held, calls = [], []

    def grows_three_times():
        calls.append(1)
        if len(calls) <= 3:
            held.append(mmap.mmap(-1, 2000 * mmap.PAGESIZE))
            for start in range(0, len(held[-1]), mmap.PAGESIZE):
                held[-1][start] = 1

    measure.warm_up(grows_three_times, torch.device("cpu"), 10, seconds=0)
    assert len(calls) == 4
    calls.clear()
    measure.warm_up(grows_three_times, torch.device("cpu"), 2, seconds=0)
    assert len(calls) == 2
