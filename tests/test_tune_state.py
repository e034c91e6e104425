"""`gam tune-state` moves the initial memory alone, and its file serves the one model that it was tuned for."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import stack

from gam_lm import LanguageModel, load_model
from gam_lm.checkpoint import load_tokenizer_of, save_model
from gam_lm.cli.main import run as command
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.inference.context import Context
from gam_lm.inference.start_file import initial_memory, load_start, save_start
from gam_lm.serve import connections, engine
from gam_lm.training import initial_memory as tuning
from gam_lm.training import loop
from gam_lm.training.evaluate import evaluate
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig

TEXT = "A cat sat on a mat. The rat ate a hat. " * 400
OTHER = "We rode home by the long road, slowly. So did they. " * 400
FLAGS = ["--steps", "12", "--batch-size", "2", "--context", "32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of a small model that has learned a little."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "cats.txt").write_text(TEXT)
    corpus = prepare(str(folder / "cats.txt"), vocab_size=280)
    recipe = TrainConfig(steps=30, batch_size=4, context=32, learning_rate=1e-2)
    fit(new_model(stack("gam", vocab_size=corpus.vocab_size), 0), corpus, recipe, folder / "cats")
    return folder / "cats"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "roads.txt").write_text(OTHER)
    return tmp_path / "roads.txt"


@pytest.fixture
def start(run, text, tmp_path):
    assert command(["tune-state", str(run), "--data", str(text), "--out", str(tmp_path / "roads.start"), *FLAGS]) == 0
    return tmp_path / "roads.start"


def test_nothing_but_the_initial_memory_moves(run, start, capsys):
    model, own = load_model(run), load_model(run)
    load_start(start, model)
    memory = initial_memory(own)
    assert memory
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, own.state_dict()[name]) != (name in memory), name
    assert set(load_file(start)) == set(memory)
    assert not tuning.working_folder(start).exists()


def test_the_text_costs_less_with_it_and_the_gradient_is_the_only_reason(run, start, text):
    corpus = prepare(str(text), tokenizer=str(run / "tokenizer.json"))
    model = load_model(run)
    before = evaluate(model, corpus.splits["valid"], context=32).nats_per_token
    load_start(start, model)
    assert evaluate(model, corpus.splits["valid"], context=32).nats_per_token < before


def test_the_gradient_of_the_initial_memory_is_that_of_finite_differences():
    torch.manual_seed(0)
    model = LanguageModel(stack("gam", vocab_size=31)).double().eval()
    tokens, targets = (torch.randint(31, (2, 9)) for _ in range(2))
    memory = initial_memory(model)
    with tuning.only_trains(model, list(memory.values())):
        model(tokens, targets)[1].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == list(memory)
    for parameter in memory.values():
        place = (0, 1, 2)
        found = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[place] += change
                found.append(float(model(tokens, targets)[1]))
                parameter[place] -= change
        torch.testing.assert_close(float(parameter.grad[place]), (found[0] - found[1]) / 2e-5, rtol=1e-5, atol=1e-10)


def test_a_training_that_was_stopped_goes_on_as_the_same_one(run, start, text, tmp_path, monkeypatch):
    taken = []
    whole_step = loop.train_step

    def stops(*arguments):
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return whole_step(*arguments)

    flags = ["tune-state", str(run), "--data", str(text), "--out", str(tmp_path / "again.start"), *FLAGS]
    monkeypatch.setattr(loop, "train_step", stops)
    monkeypatch.setattr(loop._Run, "_state_is_due", lambda self: self.step == 4)
    assert command(flags) == 130
    assert not (tmp_path / "again.start").exists() and (tmp_path / "again.start.training").is_dir()
    assert command(flags) == 0
    assert len(taken) == 6 + (12 - 4)
    first, second = load_file(start), load_file(tmp_path / "again.start")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_of_another_model_is_not_gone_on_with(run, text, tmp_path, capsys):
    out = tmp_path / "other.start"
    torch.manual_seed(5)
    corpus = prepare(str(text), tokenizer=str(run / "tokenizer.json"))
    other = LanguageModel(load_model(run).config)
    recipe = TrainConfig(steps=2, batch_size=2, context=32)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "save_start", _interrupted)
        tuning.tune_initial_memory(other, corpus, recipe, out)
    with pytest.raises(InputError, match="began with another model: remove that folder"):
        tuning.tune_initial_memory(load_model(run), corpus, recipe, out)
    assert not out.exists()


def _interrupted(*arguments):
    raise KeyboardInterrupt


def test_every_command_that_loads_a_model_takes_the_file(run, start, text, tmp_path, capsys):
    def said(*arguments):
        assert command([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    generate = ("generate", run, "--prompt", "We", "--max-new-tokens", 12, "--temperature", 0)
    model = load_model(run)
    load_start(start, model)
    ids = load_tokenizer_of(run).encode("We").ids
    context, tokens = Context(model), []
    context.read(ids)
    for _ in range(12):
        tokens.append(int(context.logits.argmax()))
        context.read(tokens[-1:])
    assert said(*generate, "--start", start).startswith("We" + load_tokenizer_of(run).decode(tokens)[:4])
    plain, tuned = (json.loads(said("eval", run, "--data", text, "--json", *more).splitlines()[-1]) for more in ((), ("--start", start)))
    assert tuned["valid_nats_per_token"] < plain["valid_nats_per_token"]
    state = tmp_path / "roads.state"
    said("read", run, text, "--out", state, "--start", start)
    assert said("generate", run, "--state", state, "--start", start, "--max-new-tokens", 2, "--seed", 0)
    assert command(["generate", str(run), "--state", str(state), "--max-new-tokens", "2"]) == 2
    assert "was read by another model" in capsys.readouterr().err


def test_the_chat_and_the_server_take_the_file(run, start, monkeypatch, capsys):
    models = []

    def seen(kind):
        whole = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *values, **named: (models.append(named.get("model") or values[0]), whole(self, *values, **named))[1])

    def occupied(*place):
        raise OSError("no place here")

    seen(Context)
    seen(engine.Engine)
    monkeypatch.setattr(connections, "listen", occupied)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert command(["chat", str(run), "--max-new-tokens", "3", "--start", str(start)]) == 0
    assert command(["serve", str(run), "--port", "0", "--start", str(start)]) == 2
    expected = load_model(run)
    load_start(start, expected)
    assert len(models) == 2
    assert all(torch.equal(each, model.state_dict()[name]) for model in models for name, each in expected.state_dict().items())


def test_the_file_is_refused_for_another_model(run, start, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    torch.manual_seed(1)
    save_model(other, LanguageModel(load_model(run).config), load_tokenizer_of(run))
    assert command(["generate", str(other), "--start", str(start)]) == 2
    error = capsys.readouterr().err
    assert "belongs to another model" in error and str(start) in error and "Traceback" not in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("kind", ["missing", "no safetensors", "no header", "lacks a tensor", "not finite"])
def test_a_broken_file_is_one_clear_line(kind, run, start, tmp_path, capsys):
    path = tmp_path / "broken.start"
    tensors = load_file(start)
    name = next(iter(tensors))
    if kind == "no safetensors":
        path.write_text("words")
    elif kind == "no header":
        save_file(tensors, path)
    elif kind in ("lacks a tensor", "not finite"):
        header = load_start(start, load_model(run))
        model = load_model(run)
        if kind == "not finite":
            with torch.no_grad():
                initial_memory(model)[name].fill_(float("nan"))
            save_start(path, model, header)
        else:
            del tensors[name]
            save_file(tensors, path, metadata={"gam_lm": header.model_dump_json()})
    assert command(["generate", str(run), "--start", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "gam tune-state" in error and len(error.splitlines()) == 1


def test_a_model_without_a_written_memory_is_refused(run, text, tmp_path, capsys):
    torch.manual_seed(0)
    plain = tmp_path / "plain"
    plain.mkdir()
    config = load_model(run).config
    save_model(plain, LanguageModel(stack("attention", vocab_size=config.vocab_size)), load_tokenizer_of(run))
    assert command(["tune-state", str(plain), "--data", str(text)]) == 2
    error = capsys.readouterr().err
    assert "no learned initial memory" in error and len(error.splitlines()) == 1


def test_a_file_that_is_there_is_not_written_over(run, start, text, capsys):
    before = start.read_bytes()
    assert command(["tune-state", str(run), "--data", str(text), "--out", str(start), *FLAGS]) == 2
    assert "which exists: choose another name" in capsys.readouterr().err
    assert start.read_bytes() == before
