"""The examples that start `gam train` on clusters: their own lines, run on this machine with the variables that the cluster would set."""

import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest
from processes import launched
from test_distributed import lines, text

import gam_lm
from gam_lm.cli.main import parse

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = ["--vocab-size", "270", "--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--context", "16", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture
def started(tmp_path):
    """Runs a command in a folder with a text; `scontrol`, `srun` and `gam` are what a cluster's do for one machine."""
    text(tmp_path / "my_texts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (
        ("scontrol", "echo 127.0.0.1"), ("srun", 'exec "$@"'), ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"'),
        ("gam", 'printf "%s\\n" "$@"'),
    ):  # fmt: skip
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)

    def run(*command, **variables):
        environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(map(str, python_path())), "OMP_NUM_THREADS": "1"}
        return launched(command, cwd=tmp_path, env=environment | variables)

    return run


def python_path():
    return [Path(gam_lm.__file__).parents[1], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def flags(out):
    return ["--data", "my_texts", *MODEL, "--steps", "10", "--tokens-per-step", "96", "--out", out]


def is_trained(run):
    assert lines(run)[-1]["step"] == 10 and (run / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_slurm_script_trains_on_the_processes_of_the_job(started, tmp_path):
    done = started(
        "bash", str(EXAMPLES / "slurm_train.sh"), *flags("run"), SLURM_JOB_NODELIST="node[1]", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_ID=str(free_port()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 sequences of 16 on 2 processes" in done.stdout
    is_trained(tmp_path / "run")


@pytest.mark.slow
def test_the_skypilot_task_trains_on_the_processes_of_the_cluster(started, tmp_path):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((EXAMPLES / "skypilot_train.yaml").read_text())
    parse(["train", *task["envs"]["FLAGS"].split()])
    done = started(
        "bash", "-c", task["run"], FLAGS=" ".join(flags("run")), SKYPILOT_NODE_IPS="127.0.0.1", SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_RANK="0",
        SKYPILOT_NUM_GPUS_PER_NODE="2", PORT=str(free_port()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    is_trained(tmp_path / "run")


def test_the_slurm_array_gives_flags_that_there_are(started):
    done = started("bash", str(EXAMPLES / "slurm_array.sh"), SLURM_CPUS_PER_TASK="3")
    assert done.returncode == 0
    parse(done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_trains_on_its_processes(started, tmp_path):
    done = started(sys.executable, str(EXAMPLES / "ray_train.py"), "2", "train", *flags("run"))
    assert done.returncode == 0, done.stderr
    is_trained(tmp_path / "run")
