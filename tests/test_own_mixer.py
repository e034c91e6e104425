"""A mixer from outside the package: examples/my_mixer.py keeps the contract, and goes through the command line as the library's own do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, checked
from gam_lm.mixers import registry
from gam_lm.mixers.gam import GAMMixer
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.mixers.registry import mixer_class, register
from gam_lm.model import LanguageModel, count_parameters
from gam_lm.runtime.imports import VARIABLE, take_imports
from gam_lm.runtime.isolation import run_isolated

EXAMPLE = Path(__file__).parent.parent / "examples" / "my_mixer.py"
TINY = ["--hidden-size", "16", "--num-hidden-layers", "2", "--vocab-size", "270", "--context", "16", "--batch-size", "2", "--steps", "3",
        "--precision", "fp32", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def own(monkeypatch):
    """The example, known within this test alone."""
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    monkeypatch.setenv(VARIABLE, "[]")
    monkeypatch.delitem(sys.modules, EXAMPLE.stem, raising=False)
    assert take_imports(["models", "--import", str(EXAMPLE)]) == ["models"]
    yield ModelConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, mixers=("moving_average", "gam"))
    monkeypatch.delitem(sys.modules, EXAMPLE.stem, raising=False)


def gam(*arguments, cwd, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "gam_lm", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, **more)


def test_it_streams_as_it_reads_and_keeps_sequences_apart(own):
    torch.manual_seed(0)
    model = LanguageModel(own).double().eval()
    tokens = torch.randint(20, (2, 23))
    whole, _ = model(tokens)
    pieces, state = [], None
    for start, end in ((0, 1), (1, 9), (9, 10), (10, 23)):
        logits, state = model.stream(tokens[:, start:end], state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)
    padded = torch.cat([tokens[:1, :9], torch.zeros(1, 3, dtype=torch.long), tokens[1:, :11]], 1)
    segments = torch.tensor([[1] * 9 + [0] * 3 + [2] * 11])
    packed, _ = model(padded, segments=segments)
    torch.testing.assert_close(packed[:, :9], whole[:1, :9], rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, 12:], whole[1:, :11], rtol=0, atol=1e-10)


def test_what_it_says_of_its_cost_is_so(own):
    mixer = mixer_class("moving_average")(own)
    cost = mixer.cost(own, 12)
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.state_bytes == sum(part.nbytes for part in mixer.initial_state(1, dtype=torch.float32))
    assert count_parameters(own) == LanguageModel(own).count_parameters()


def test_it_keeps_its_options_in_the_config_and_checks_them(own):
    again = ModelConfig.from_dict(json.loads(json.dumps(own.to_dict())))
    assert again == own and again.to_dict()["options"]["moving_average"]["memory"] == 32.0
    with pytest.raises(InputError, match=r"memory is 0.5: use a number above 1"):
        ModelConfig.from_dict(own.to_dict() | {"options": {"moving_average": {"memory": 0.5}}})


@checked
class WiderOptions(GAMOptions):
    """GAM's with an option more."""

    more: int = 1


class Wider(GAMMixer):
    """GAM's with options of its own."""

    options_type = WiderOptions


def test_options_that_derive_from_another_mixers_stay_apart(own):
    register("wider", WiderOptions, Wider)
    first, second = GAMOptions(num_memory_slots=8, num_heads=2), WiderOptions(num_memory_slots=16, num_heads=1, more=2)
    for mixers in (("gam", "wider"), ("wider", "gam")):
        for options in ((first, second), (second, first)):
            config = ModelConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, mixers=mixers, options=options)
            assert config.options_of(GAMOptions).num_memory_slots == 8 and config.options_of(WiderOptions).num_memory_slots == 16
            assert ModelConfig.from_dict(config.to_dict()) == config
            layers = {type(layer.mixer): layer.mixer for layer in LanguageModel(config).layers}
            assert layers[GAMMixer].written.bank.shape == (2, 4, 4) and layers[Wider].written.bank.shape == (1, 16, 8)
            assert Wider.cost(config, 9).parameters == sum(each.numel() for each in layers[Wider].parameters())
            assert config.replace(mixers=("gam",)).options == (config.options_of(GAMOptions),)
            assert config.replace(mixers=("wider",)).options == (config.options_of(WiderOptions),)
    only = ModelConfig(vocab_size=20, hidden_size=8, mixers=("gam", "wider"), options=(second,))
    assert only.options_of(WiderOptions).more == 2 and only.options_of(GAMOptions).num_memory_slots == 8
    register("twin", GAMOptions, GAMMixer)
    with pytest.raises(InputError, match="two of them share one options class"):
        ModelConfig(vocab_size=20, mixers=("gam", "twin"))


def test_a_registered_name_is_not_given_twice(own):
    kind = mixer_class("gam")
    with pytest.raises(InputError, match="registered already"):
        register("moving_average", kind.options_type, kind)
    register("moving_average", mixer_class("moving_average").options_type, mixer_class("moving_average"))  # the same again is no other
    for name in ("x:y", "hf:", "a+b", "a.b", "", "1st", "two words"):
        with pytest.raises(InputError, match="use letters, digits"):
            register(name, kind.options_type, kind)


def test_it_trains_streams_is_benched_and_appears_in_the_tables(tmp_path):
    (tmp_path / "novel.txt").write_text("once upon a time there was a cat that sat on the mat\n" * 300)
    own = ["--import", str(EXAMPLE)]
    trained = gam(
        *own, "train", "--model", "moving_average", "--moving_average.memory", "8", "--data", "novel.txt", "--out", "run", *TINY, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["mixers"] == ["moving_average"] and saved["options"]["moving_average"]["memory"] == 8.0
    generated = gam("generate", "run", "--prompt", "once", "--max-new-tokens", "5", "--seed", "1", *own, cwd=tmp_path)
    assert generated.returncode == 0 and generated.stdout.startswith("once"), generated.stderr

    names = ["moving_average", 'gam-hybrid+mixers=["moving_average","attention"]', "gam"]
    bench = gam("bench", "--models", *names, "--data", "novel.txt", "--out", "compared", *TINY, *own, cwd=tmp_path)
    assert bench.returncode == 0, bench.stderr
    content = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert [row["model"] for row in content["rows"] if "seed" in row] == names and "--import" in content["command"]
    assert "| moving_average |" in (tmp_path / "compared" / "table.md").read_text() and "| moving_average |" in bench.stdout

    # Scaling measures every cell in a process of its own.
    scale = gam("scale", "--models", "moving_average", "--lengths", "8", "16", "--hidden-size", "16", "--iterations", "1", "--warmup", "1",
                "--out", "scaled", "--device", "cpu", *own, cwd=tmp_path)  # fmt: skip
    assert scale.returncode == 0 and "| moving_average |" in scale.stdout, scale.stderr
    assert "| moving_average | A gated exponential moving average" in gam("models", *own, cwd=tmp_path).stdout

    refused = gam("generate", "run", "--prompt", "once", cwd=tmp_path)  # without the import nobody knows it
    assert refused.returncode == 2 and "moving_average" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--import"], "has no value"), (["--import", "none/such.py"], "no such Python file"), (["--import=no.such_module"], "no such module")],
)  # fmt: skip
def test_an_import_that_is_not_there_is_one_line(given, said, capsys):
    assert run(["models", *given]) == 2
    assert said in (line := capsys.readouterr().err) and len(line.strip().splitlines()) == 1


def test_a_file_that_would_hide_a_module_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(InputError, match="rename the file"):
        take_imports(["--import", str(tmp_path / "json.py")])
    assert sys.modules["json"] is json


def test_a_measuring_process_loads_what_its_parent_did(own, tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(
        "from gam_lm.mixers.registry import mixer_names\n\ndef known(parameters, peak):\n    return {'known': mixer_names()}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "moving_average" in run_isolated("probe:known", {}, seconds=60, memory_mb=4096).figures["known"]
