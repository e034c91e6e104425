"""A process of a run that dies: one line names it, the job ends within a minute, and the launcher may start it again."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import launched
from test_distributed import lines, text, weights

import gam_lm
from gam_lm.checkpoint import load_model

KILLER = """
import os, signal, threading, time
from pathlib import Path

def kill(run):
    while not any((run / "state").glob("step-*")):
        time.sleep(0.01)
    os.kill(os.getpid(), SIGNAL)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=kill, args=(Path(RUN),), daemon=True).start()
"""


def started(count, folder, run, *launcher, signal=None, steps=60):
    """`gam train --shard` on several processes, of which the second gets a signal when the first state is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gam_lm.__file__).parents[1])}
    killer = folder / "killer.py"
    killer.write_text(KILLER.replace("SIGNAL", f"signal.{signal}").replace("RUN", repr(str(run))) if signal else "")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *launcher, "-m", "gam_lm",
        "--import", str(killer), "train", "--data", str(folder / "text"), "--vocab-size", "270", "--hidden-size", "16", "--num-hidden-layers", "1",
        "--gam.num-heads", "2", "--steps", str(steps), "--batch-size", "6", "--context", "16", "--precision", "fp32", "--device", "cpu", "--checkpoint-every",
        "10", "--out", str(run), "--shard",
    ]  # fmt: skip
    begun = time.monotonic()
    done = launched(command, env=environment)
    return done, time.monotonic() - begun


@pytest.mark.slow
def test_a_killed_process_is_named_once_and_the_same_command_goes_on(tmp_path):
    text(tmp_path / "text")
    done, _ = started(3, tmp_path, tmp_path / "run", signal="SIGKILL", steps=100_000)
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if line.startswith("gam: ")]
    assert said == ["gam: process 1 of 3 died; the same command goes on from the last state"]


@pytest.mark.slow
def test_the_launcher_starts_a_killed_job_again_and_the_run_is_the_same(tmp_path):
    text(tmp_path / "text")
    whole, _ = started(2, tmp_path, tmp_path / "whole", steps=40)
    killed, _ = started(2, tmp_path, tmp_path / "killed", "--max-restarts", "1", signal="SIGKILL", steps=40)
    assert whole.returncode == killed.returncode == 0, killed.stderr
    assert "resuming" in killed.stderr
    figures = [[(line["step"], line["tokens"], line["train_nats"]) for line in lines(tmp_path / run)] for run in ("whole", "killed")]
    assert figures[0] == figures[1]
    torch.testing.assert_close(*(weights(load_model(tmp_path / run)) for run in ("whole", "killed")), rtol=0, atol=0)
