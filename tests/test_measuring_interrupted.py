"""Commands that measure: a training that diverges is a row and the rest goes on, a kill loses no finished row, and every file stays JSON."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gam_lm.cli.main import run
from gam_lm.results import read_results

SIZE = ["--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--device", "cpu", "--precision", "fp32", "--compile", "off"]


def strict(path):
    """The file as JSON that knows no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


def test_a_recall_that_diverges_is_a_row_and_the_others_go_on(tmp_path, capsys):
    command = ["recall", "--out", str(tmp_path / "out"), "--models", "gam", "--pairs", "2", "--length", "16", "--vocab-size", "32", "--batch-size", "2", "--steps", "3",
               "--warmup-steps", "0", "--clip", "0", *SIZE]  # fmt: skip
    assert run([*command, "--learning-rate", "1e30"]) == 0
    said = capsys.readouterr().out
    (row,) = strict(tmp_path / "out" / "results.json")["rows"]
    assert row["diverged"] and row["divergence"]["step"] >= 1 and "accuracy" not in row and "Diverged: gam (seed 0, 2 pairs, 16 tokens)" in said
    assert run([*command, "--learning-rate", "1e30"]) == 0  # it is there: not trained again
    assert run([*command, "--learning-rate", "1e-3"]) == 0
    rows = strict(tmp_path / "out" / "results.json")["rows"]
    assert len(rows) == 2 and "accuracy" in rows[1]


def figures(path):
    """Rows without what depends on the machine's speed."""
    timed = {"train_seconds", "step_ms", "tokens_per_second", "epoch_seconds", "environment"}
    rows = [{key: value for key, value in row.items() if key not in timed} for row in strict(path)["rows"]]
    return [row | {"curve": [{key: value for key, value in point.items() if key != "seconds"} for point in row.get("curve", ())]} for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_bench_that_is_stopped_goes_on_as_if_it_had_not_been(how, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"alpha beta {i % 7} gamma delta\n" for i in range(600)))
    command = ["bench", "--data", str(text), "--models", "gam", "gam-static", "--steps", "40", "--batch-size", "2", "--context", "16", "--vocab-size", "270",
               "--checkpoint-every", "5", "--validate-every", "20", "--no-timing", *SIZE]  # fmt: skip
    # Each in a process of its own: what other tests set in this one (threads, say) would round otherwise.
    subprocess.run([sys.executable, "-m", "gam_lm", *command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, env=os.environ)
    out = tmp_path / "stopped"
    process = subprocess.Popen([sys.executable, "-m", "gam_lm", *command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and not any(out.glob("runs/gam-static-seed0/state/step-*")):
        time.sleep(0.01)
    process.send_signal(getattr(signal, how))
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, -getattr(signal, how), 130) and "Traceback" not in said
    assert "gam" in [row["model"] for row in read_results(out / "results.json")["rows"]]  # the finished row was there
    subprocess.run([sys.executable, "-m", "gam_lm", *command, "--out", str(out)], check=True, capture_output=True, env=os.environ)
    assert figures(out / "results.json") == figures(tmp_path / "whole" / "results.json")
    for weights in (tmp_path / "whole" / "runs").glob("*/model.safetensors"):
        assert weights.read_bytes() == (out / "runs" / weights.parent.name / "model.safetensors").read_bytes()
