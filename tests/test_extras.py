"""The core works alone; what an extra brings is asked for in one line, with the pip command, when it is needed and not before."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from test_cli import TINY, refused, text, trained  # noqa: F401

from gam_lm.cli.main import run
from gam_lm.errors import MissingExtraError

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "matplotlib": "plot", "datasets": "data", "pyarrow": "data", "tensorboard": "track", "transformers": "hf", "accelerate": "hf", "peft": "hf",
    "onnx": "export", "onnxscript": "export", "onnxruntime": "export", "starlette": "serve", "uvicorn": "serve", "lm_eval": "eval", "fla": "fla", "triton": "triton",
    "numba": "numba", "jinja2": "plot", "optuna": "tune", "zstandard": "data", "prometheus_client": "serve",
}  # fmt: skip
"""What is imported from each extra."""

ASKED = {
    "plot": ("matplotlib", ["bench", "--data", "{text}", "--models", "gam", "--steps", "1", "--out", "{out}", *TINY]),
    "data": ("datasets", ["data", "prepare", "wikitext-2"]),
    "track": ("torch.utils.tensorboard", ["train", "--data", "{text}", "--tracker", "tensorboard", "--steps", "1", "--out", "{out}", *TINY]),
    "export": ("onnx", ["export", "{trained}", "--out", "{out}"]),
    "serve": ("uvicorn", ["serve", "{trained}", "--device", "cpu"]),
    "tune": ("optuna", ["tune", "--data", "{text}", "--models", "gam", "--trials", "1", "--steps", "1", "--out", "{out}", *TINY]),
    "eval": ("lm_eval", ["eval", "{trained}", "--harness", "wikitext"]),
}  # fmt: skip


@pytest.mark.parametrize("extra", ASKED)
def test_a_missing_extra_is_one_line_with_the_pip_command(extra, text, trained, tmp_path, capsys, monkeypatch):  # noqa: F811
    package, command = ASKED[extra]
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:  # also what an earlier test has imported
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "gam_lm.experiments.tune", raising=False)
    places = {"text": text, "trained": trained, "out": tmp_path / "out"}
    assert refused(capsys, [word.format(**places) for word in command]).endswith(f": pip install 'gam-lm[{extra}]'")
    assert extra in PROJECT["optional-dependencies"]


def test_parquet_and_the_kernels_ask_for_their_extras_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "text.parquet").write_bytes(b"PAR1")
    assert refused(capsys, ["data", "prepare", str(tmp_path / "text.parquet")]).endswith("pip install 'gam-lm[data]'")

    from torch._subclasses.fake_tensor import FakeTensorMode

    from gam_lm.ops.delta_rule_kernels import fla_delta_memory

    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with FakeTensorMode():  # a GPU that is not there
        x, gate = torch.empty(1, 4, 2, 8, device="cuda"), torch.empty(1, 4, 2, device="cuda")
        with pytest.raises(MissingExtraError, match=r"pip install 'gam-lm\[fla\]'"):
            fla_delta_memory(x, x, x, gate, gate, torch.empty(2, 8, 8, device="cuda"))


@pytest.mark.slow
def test_the_core_trains_evaluates_and_generates_without_any_extra(text, tmp_path):  # noqa: F811
    script = f"""
import json, sys
for package in {sorted(PACKAGES)}:
    sys.modules[package] = None
from gam_lm.cli.main import VERBS, run
out = {str(tmp_path / "run")!r}
data = ["--data", {str(text)!r}]
codes = [run(["train", *data, "--steps", "2", "--out", out, *{TINY!r}]), run(["eval", out, *data, "--device", "cpu"]),
         run(["generate", out, "--prompt", "alpha", "--max-new-tokens", "3", "--device", "cpu"]),
         run(["export", out, "--format", "int8", "--out", out + "-int8"]), run(["inspect", "receptive-field", out])]
loaded = [name for name in sys.modules if name.split(".")[0] in {sorted(PACKAGES)} and sys.modules[name] is not None]
print(json.dumps([codes, loaded]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * 5, done.stderr
    assert loaded == []


def test_every_extra_and_every_package_of_it_is_declared():
    extras = PROJECT["optional-dependencies"]
    assert {"hf", "data", "plot", "eval", "serve", "export", "track", "fla", "numba", "triton", "tune", "dev"} == extras.keys()
    named = {extra: {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in packages} for extra, packages in extras.items()}
    distribution = {"fla": "flash_linear_attention"}
    for package, extra in PACKAGES.items():
        assert distribution.get(package, package) in named[extra]
    core = {re.match(r"[\w-]+", each)[0] for each in PROJECT["dependencies"]}
    assert core == {"torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "pydantic", "filelock"}


@pytest.mark.parametrize("verb", ["bench", "scale", "recall", "train", "tune"])
def test_help_needs_no_extra(verb, capsys, monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as done:
        run([verb, "--help"])
    assert done.value.code == 0 and "--out" in capsys.readouterr().out
