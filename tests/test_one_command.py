"""`gam train my_text.txt` and what follows it, from an empty folder."""

import dataclasses
import io
import json
import math
import os
import signal
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import tyro
from one_command import SMALL, WORDS, make_folder, refused

import gam_lm.training.distributed as distributed
import gam_lm.training.loop as loop
from gam_lm.checkpoint import load_model, read_json
from gam_lm.cli.evaluate import distinct_names
from gam_lm.cli.flag_list import flags_of
from gam_lm.cli.main import VERBS, parse, run, verb_class
from gam_lm.cli.outcome import meaning
from gam_lm.cli.train import Train
from gam_lm.cli.training_flags import check_flags
from gam_lm.cli.training_job import job_of
from gam_lm.data.corpora import load_corpus
from gam_lm.errors import InputError
from gam_lm.presets.setups import preset
from gam_lm.results import read_results
from gam_lm.runtime.ownership import owned
from gam_lm.training.distributed import World
from gam_lm.training.recipe import TrainConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return make_folder(tmp_path, monkeypatch)


@pytest.fixture
def interrupted(monkeypatch):
    """Presses Ctrl-C in step ``number`` of the next run."""

    def press(number):
        original, count = loop.train_step, 0

        def step(*arguments):
            nonlocal count
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGINT)
            return original(*arguments)

        monkeypatch.setattr(loop, "train_step", step)
        return lambda: monkeypatch.setattr(loop, "train_step", original)

    return press


def weights(directory):
    return load_model(directory).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plan_lines(output):
    heads = ("text  ", "vocabulary  ", "model  ", "training  ", "time  ")
    return [line for line in output.splitlines() if line.startswith(heads)]


def test_a_text_is_all_it_takes_and_the_plan_comes_first(folder, capsys):
    assert run(["train", "my_text.txt", "--minutes", "0.05", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:5] == plan_lines(said) and "1 document" in said.splitlines()[0]
    saved = read_json(folder / "runs/my_text/recipe.json")
    recipe = TrainConfig.from_dict(saved["train_config"])
    assert 1 <= recipe.steps <= 0.05 * 60 / 0.1 and saved["plan"]["minutes"] == 0.05 and recipe.keep == "best"
    assert f"{recipe.steps:,} steps of {recipe.batch_size} × {recipe.context} tokens" in said
    for floor in ("unigram", "bigram", "xz"):
        assert f"{floor} " in said
    assert "A sample:" in said and "gam train OTHER_TEXT --from runs/my_text" in said


def test_a_finished_run_leaves_its_figures(folder, capsys):
    assert run(["train", "my_text.txt", "--minutes", "0.05", *SMALL]) == 0
    said = capsys.readouterr().out
    results = read_results(folder / "runs/my_text/results.json")
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == ["unigram", "bigram", "xz", "gam"]
    own, saved = rows["gam"], read_json(folder / "runs/my_text/recipe.json")
    assert f"bits per byte: {own['val_bits_per_byte']:.3f}; without a model: unigram {rows['unigram']['val_bits_per_byte']:.3f}" in said
    assert (own["model_config"], own["train_config"], results["corpus"]) == (saved["model_config"], saved["train_config"], saved["corpus"])
    assert own["minutes"] == 0.05 and own["expected_seconds"] == saved["plan"]["seconds"] and own["run_seconds"] >= own["train_seconds"] > 0
    assert run(["train", "my_text.txt", "--device", "cpu"]) == 0  # is finished: the figures stay
    assert {row["model"]: row for row in read_results(folder / "runs/my_text/results.json")["rows"]} == rows


def test_the_papers_blocks_give_the_figure_that_an_evaluation_gives(folder, capsys):
    assert run(["train", "my_text.txt", "--steps", "3", "--blocks", "paper", "--valid-tokens", "10000000", *SMALL]) == 0
    row = read_results(folder / "runs/my_text/results.json")["rows"][-1]
    assert f"{row['val_bits_per_byte']:.4f} bits/byte" in capsys.readouterr().out and row["paper_val_nats"] > 0
    assert run(["eval", "runs/my_text", "--data", "my_text.txt", "--device", "cpu", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["valid_bits_per_byte"] == pytest.approx(row["val_bits_per_byte"], rel=1e-6)


def test_flags_go_before_the_plan(folder, capsys):
    assert run(["train", "my_text.txt", "--steps", "3", "--learning-rate", "0.005", "--dropout", "0.25", *SMALL]) == 0
    saved = read_json(folder / "runs/my_text/recipe.json")
    assert (saved["train_config"]["steps"], saved["train_config"]["learning_rate"], saved["train_config"]["batch_size"]) == (3, 0.005, 4)
    model = saved["model_config"]
    assert (model["hidden_size"], model["dropout"], model["options"]["gam"]["num_heads"]) == (16, 0.25, 2)
    assert saved["plan"]["vocab_size"] == 280


def test_a_preset_or_a_number_of_epochs_is_taken_as_it_is(folder):
    assert run(["train", "my_text.txt", "--preset", "small-cpu", "--steps", "2", "--out", "set", *SMALL]) == 0
    saved = read_json(folder / "set/recipe.json")
    assert TrainConfig.from_dict(saved["train_config"]) == preset("small-cpu").train.replace(steps=2, context=16, batch_size=4, precision="fp32")
    assert saved["model_config"]["dropout"] == 0.0 and saved["plan"]["minutes"] == 0
    assert run(["train", "my_text.txt", "--preset", "small-cpu", "--steps", "2", "--out", "set", *SMALL]) == 0  # goes on, here: is finished
    assert run(["train", "my_text.txt", "--epochs", "0.05", "--out", "part", *SMALL]) == 0
    steps = read_json(folder / "part/recipe.json")["train_config"]["steps"]
    assert steps == round(0.05 * (read_json(folder / "part/recipe.json")["corpus"]["tokens"] - 1) // 16 // 4)


def test_several_paths_are_one_text(folder, capsys):
    for i in range(3):
        (folder / f"{i}.md").write_text(" ".join(WORDS * 40) + f" {i}\n", encoding="utf-8")
    assert run(["train", "0.md", "1.md", "2.md", "--steps", "2", *SMALL]) == 0
    assert "3 documents" in capsys.readouterr().out and (folder / "runs/0/model.safetensors").is_file()


def test_what_is_left_out_is_in_the_plan(folder, capsys):
    (folder / "texts").mkdir()
    (folder / "my_text.txt").rename(folder / "texts/a.txt")
    (folder / "texts/picture.png").write_bytes(b"\x89PNG")
    assert run(["train", "texts", "--steps", "2", *SMALL]) == 0
    assert "picture.png" in capsys.readouterr().out.splitlines()[0]


def test_an_interrupted_run_goes_on_with_its_plan_as_if_nothing_had_been(folder, capsys, interrupted):
    command = ["train", "my_text.txt", "--minutes", "0.03", *SMALL]
    again = interrupted(4)
    assert run(command) == 130
    again()
    out = folder / "runs/my_text"
    before = read_json(out / "recipe.json")
    assert read_json(next((out / "state").glob("step-*")) / "progress.json")["step"] == 4
    capsys.readouterr()
    assert run(["train", "my_text.txt", "--device", "cpu"]) == 0  # no other flag: the plan is saved
    assert read_json(out / "recipe.json") == before
    assert len(plan_lines(capsys.readouterr().out)) == 5
    assert run(["train", "--out", str(out), "--device", "cpu"]) == 0  # nor the text
    assert run(["train", "--config", str(out / "run.toml"), "--out", "whole", "--device", "cpu"]) == 0
    assert same(weights(out), weights(folder / "whole"))


def test_the_file_that_repeats_a_run_holds_its_flags(folder):
    assert run(["train", "my_text.txt", "--steps", "2", *SMALL]) == 0
    values = tomllib.loads((folder / "runs/my_text/run.toml").read_text(encoding="utf-8"))
    assert values["texts"] == ["my_text.txt"] and values["steps"] == 2 and values["gam"]["num_heads"] == 2
    (verb,) = parse(["train", "--config", "runs/my_text/run.toml", "--steps", "5", "--gam.num-heads", "4"])
    assert verb.texts == ("my_text.txt",) and verb.recipe.steps == 5 and verb.architecture.gam.num_heads == 4  # what is typed goes before the file
    assert verb.recipe.batch_size == 4 and verb.recipe.shuffle_documents is False and verb.architecture.hidden_size == 16


def test_what_is_typed_goes_before_the_file_under_another_name_too(folder):
    (folder / "run.toml").write_text('texts = ["a.txt"]\nbatch_size = 8\nsteps = 5\nbetas = [0.8, 0.9]\n', encoding="utf-8")

    def parsed(*words):
        (verb,) = parse(["train", *words, "--config", "run.toml"])
        return verb

    assert parsed().texts == parsed("--seed", "1").texts == parsed("--betas", "0.7", "0.8").texts == ("a.txt",)
    assert parsed("b.txt").texts == parsed("--seed", "1", "b.txt").texts == parsed("--betas", "0.7", "0.8", "b.txt").texts == ("b.txt",)
    assert (parsed("--data", "b.txt").texts, parsed("--data", "b.txt").text.data) == ((), "b.txt")
    assert (parsed("--chat", "c.jsonl").texts, str(parsed("--chat", "c.jsonl").chat)) == ((), "c.jsonl")
    assert "batch_size" not in parsed("--tokens-per-step", "64").given and "batch_size" in parsed().given
    with pytest.raises(InputError, match="minutes is 3, and steps is 5"):
        check_flags(parsed("--minutes", "3"))


def test_the_last_of_repeated_flags_counts_wherever_it_is_read(folder):
    (verb,) = parse(["train", "--model", "mamba", "--preset", "laptop", "--model", "gam-mean", "--preset=small-cpu"])
    assert verb.model == "gam-mean" and verb.architecture.gam.write == "mean" and verb.recipe == preset("small-cpu").train


def test_more_validation_tokens_than_there_are_are_all_of_them(folder, capsys):
    command = ["train", "my_text.txt", "--steps", "2", "--valid-tokens", "10000000", *SMALL]
    assert run(command) == 0 and run(command) == 0  # goes on, here: is finished
    capsys.readouterr()
    assert "another run (valid_tokens" in refused(capsys, [*command, "--valid-tokens", "100"])


def test_the_first_of_several_processes_writes_its_plan_as_the_owner_of_the_folder(folder, capsys, monkeypatch):
    class Two(World):
        def first(self, work, then=None):
            return work()

    monkeypatch.setattr(distributed, "joined", lambda device: nullcontext((Two(0, 2), device)))
    with owned(folder / "run"):
        assert "is writing" in refused(capsys, ["train", "my_text.txt", "--steps", "2", "--out", "run", *SMALL])
    assert not (folder / "run/recipe.json").exists()


def test_what_is_switched_off_comes_back_from_the_file(folder):
    off = ["--validate-every", "None", "--muon-learning-rate", "None", "--minutes", "0.05"]
    assert run(["train", "my_text.txt", *off, *SMALL]) == 0
    assert run(["train", "--config", "runs/my_text/run.toml", "--out", "again", "--device", "cpu"]) == 0
    first, again = (read_json(folder / name / "recipe.json") for name in ("runs/my_text", "again"))
    assert first["train_config"]["validate_every"] is None
    assert (first["train_config"], first["model_config"]) == (again["train_config"], again["model_config"])


def test_a_name_that_is_no_utf_8_is_trained_on(folder, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace"))  # as the command's is
    name = os.fsdecode(b"h\xe9.txt")
    (folder / "my_text.txt").rename(folder / name)
    assert run(["train", name, "--steps", "2", "--out", os.fsdecode(b"r\xe9"), *SMALL]) == 0
    text = (folder / os.fsdecode(b"r\xe9") / "run.toml").read_text(encoding="utf-8")
    assert "# give this on the command line" in text and "steps = 2" in text
    (verb,) = parse(["train", name, "--config", str(folder / os.fsdecode(b"r\xe9") / "run.toml")])
    assert verb.texts == (name,) and verb.recipe.steps == 2


def test_a_corpus_whose_name_is_also_here_says_how_the_other_is_read(folder, caplog):
    (folder / "stdlib").mkdir()
    with caplog.at_level("INFO", logger="gam_lm"):
        load_corpus("stdlib")
    assert "data stdlib is the corpus of that name, not what is in this folder: for that write ./stdlib" in caplog.text


def test_runs_of_one_name_keep_their_rows(folder, capsys, monkeypatch):
    for seed in ("0", "1"):
        assert run(["train", "my_text.txt", "--steps", "1", "--out", f"{seed}/gam", *SMALL]) == 0
    assert run(["eval", "0/gam", "1/gam", "--data", "my_text.txt", "--out", "found", "--device", "cpu"]) == 0
    assert [row["model"] for row in read_results(folder / "found/results.json")["rows"]] == ["0/gam", "1/gam"]
    monkeypatch.chdir(folder / "0/gam")
    assert run(["eval", ".", "--data", "../../my_text.txt", "--out", "../../one", "--device", "cpu"]) == 0
    assert [row["model"] for row in read_results(folder / "one/results.json")["rows"]] == ["gam"]
    assert distinct_names([Path("/a/x/gam"), Path("/b/x/gam"), Path("/b/x/other"), Path("/b/x/other")]) == ["a/x/gam", "b/x/gam", "other", "other"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("stepz = 3", "did you mean 'steps'"), ("steps = ", "is no TOML"), ("steps = 1979-05-27", "use a number, a text")],
)
def test_a_broken_config_is_one_line(folder, capsys, content, said):
    (folder / "run.toml").write_text(content, encoding="utf-8")
    assert said in refused(capsys, ["train", "my_text.txt", "--config", "run.toml"])
    assert "no such file" in refused(capsys, ["generate", "runs", "--config", "none.toml"])


def test_config_gives_the_flags_of_any_verb(folder):
    (folder / "g.toml").write_text('run_directory = "runs/x"\nprompt = "Once"\ncompile = true\ntop-k = 7\n', encoding="utf-8")
    (verb,) = parse(["generate", "--config", "g.toml", "--temperature", "0"])
    assert (str(verb.run_directory), verb.prompt, verb.compile, verb.top_k, verb.temperature) == ("runs/x", "Once", True, 7, 0.0)
    (verb,) = parse(["generate", "runs/y", "--config", "g.toml"])
    assert str(verb.run_directory) == "runs/y"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes", "3"], "minutes"), (["--hidden-size", "32"], "its model has hidden_size 16, not 32"), (["--model", "mamba"], "model gam, not mamba"),
        (["--learning-rate", "0.1"], "its recipe has learning_rate 0.005, not 0.1"), (["--vocab-size", "300"], "vocab_size 280, not 300"),
    ],
)  # fmt: skip
def test_a_directory_that_cannot_go_on_says_why(folder, capsys, flags, said):
    assert run(["train", "my_text.txt", "--minutes", "0.02", "--learning-rate", "0.005", *SMALL]) == 0
    before = (folder / "runs/my_text/run.toml").read_text(encoding="utf-8")
    message = refused(capsys, ["train", "my_text.txt", "--device", "cpu", *flags])
    assert said in message and "runs/my_text" in message
    assert (folder / "runs/my_text/run.toml").read_text(encoding="utf-8") == before
    (folder / "my_text.txt").write_text(" ".join(WORDS * 300), encoding="utf-8")
    assert "its data has sha256" in refused(capsys, ["train", "my_text.txt", "--device", "cpu"])


def test_the_best_state_is_kept_where_validation_rises(folder, capsys, monkeypatch):
    """A rate that wrecks the model late in the run: the state of the best validation is what is saved, and both figures are told."""
    monkeypatch.setattr(TrainConfig, "rate", lambda self, step, total: 3e-3 if step < 6 else 3.0)
    common = ["--optimizer", "adamw", "--validate-every", "2", "--clip", "0", *SMALL]
    assert run(["train", "my_text.txt", "--steps", "12", "--out", "long", *common]) == 0
    said = capsys.readouterr().out
    assert "kept: the state of step 6 of 12" in said and "validation rose" in said
    points = [json.loads(line) for line in (folder / "long/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    nats = {point["step"]: point["val_nats"] for point in points if "val_nats" in point}
    assert min(nats, key=nats.get) == 6 and nats[12] > nats[6] + 0.5
    assert f"validation: {nats[6]:.4f}" in said
    assert run(["train", "my_text.txt", "--steps", "6", "--out", "short", *common]) == 0
    assert same(weights("long"), weights("short"))
    kept = weights("long")
    assert run(["train", "--out", "long", "--device", "cpu"]) == 0  # a finished run that is started again changes nothing
    assert same(weights("long"), kept)
    assert run(["train", "my_text.txt", "--steps", "12", "--out", "last", "--keep", "last", *common]) == 0
    assert not same(weights("last"), kept)


def test_a_trained_model_goes_on_with_other_text(folder, capsys):
    assert run(["train", "my_text.txt", "--steps", "60", *SMALL]) == 0
    (folder / "other.txt").write_text(" ".join(WORDS[::-1] * 300), encoding="utf-8")
    capsys.readouterr()
    assert run(["train", "other.txt", "--from", "runs/my_text", "--steps", "4", "--context", "16", "--batch-size", "4", "--device", "cpu"]) == 0
    said, out = capsys.readouterr().out, folder / "runs/my_text-other"
    assert "starting from runs/my_text" in said and (out / "tokenizer.json").read_bytes() == (folder / "runs/my_text/tokenizer.json").read_bytes()
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert curve[0]["train_nats"] < math.log(280) - 0.3  # it began with what it had learned
    rate, fresh = (read_json(folder / f"runs/{name}/recipe.json")["train_config"]["learning_rate"] for name in ("my_text-other", "my_text"))
    assert rate < fresh
    assert run(["train", "other.txt", "--from", "runs/my_text", "--device", "cpu"]) == 0  # goes on, here: is finished
    (folder / "runs/my_text").rename(folder / "runs/elsewhere")
    assert run(["train", "--out", str(out), "--device", "cpu"]) == 0  # it has a tokenizer of its own
    (folder / "runs/elsewhere").rename(folder / "runs/my_text")
    assert "keeps model and tokenizer" in refused(capsys, ["train", "other.txt", "--from", "runs/my_text", "--hidden-size", "8", "--out", "x"])
    assert "does not exist" in refused(capsys, ["train", "other.txt", "--from", "runs/none", "--out", "x"])
    assert "holds another run (from" in refused(capsys, ["train", "other.txt", "--from", "runs/my_text-other", "--out", str(out)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "data is not given"), (["train", "none.txt"], "no such file"), (["train", "my_text.txt", "--data", "stdlib"], "use one of them"),
        (["train", "my_text.txt", "--minutes", "0"], "minutes is 0"), (["train", "my_text.txt", "stdlib"], "one corpus by its name"),
        (["train", "--chat", "c.jsonl", "--from", "x", "--valid-tokens", "9"], "valid_tokens is 9, and chat is given: leave it out"),
        (["train", "my_text.txt", "--minutes", "3", "--steps", "5"], "minutes is 3, and steps is 5"),
        (["train", "--minutes", "3", "--preset", "small-cpu"], "minutes is 3, and preset is small-cpu"),
        (["train", "my_text.txt", "--valid-tokens", "0"], "valid_tokens is 0"), (["train", "--chat", "c.jsonl"], "add --from RUN"),
        (["train", "my_text.txt", "--out", "."], "not empty and no run directory"), (["chat", "none"], "does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folder, capsys, arguments, said):
    assert said in refused(capsys, [*arguments, "--device", "cpu"])
    assert not (folder / "runs").exists()


def shown_help(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        run(list(arguments))
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_what_people_use_first_and_help_all_every_flag_that_is_read(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    kind = verb_class(verb)
    known = {flag.name: flag for flag in flags_of(kind, positional_required=VERBS[verb].positional)}
    first = [name for names in getattr(kind, "first", {}).values() for name in names]
    short, whole = (shown_help(capsys, *verb.split(), flag) for flag in ("--help", "--help-all"))
    assert set(first) <= known.keys() and len(first or known) <= 12 and len(set(first)) == len(first)
    assert all(":`" not in each and "``" not in each for each in (short, whole))
    listed = {word.rstrip(",") for line in whole.splitlines() for word in line.split() if line.startswith("    --") and word.startswith("--")}
    with pytest.raises(SystemExit):  # what reads the flags lists them too
        tyro.cli(kind, args=["--help"], default=kind.defaults([])[0] if hasattr(kind, "defaults") else None)
    read = capsys.readouterr().out
    for name, flag in known.items():
        plain = f"--{name}".replace("_", "-")
        assert flag.positional or plain in read, plain
        before, _, last = plain.removeprefix("--").rpartition(".")
        assert flag.positional or listed & {plain, "--" + ".".join(filter(None, (before, f"no-{last}")))}, plain
    assert ("--help-all" in short) == (bool(first) and len(first) < len(known))


def test_help_shows_the_defaults_that_act(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    plain, preset = (" ".join(shown_help(capsys, "train", *more, "--help-all").split()) for more in ([], ["--preset", "laptop"]))
    for name in ("--steps INT", "--hidden-size INT"):
        before, after = (each.partition(name)[2].partition(" --")[0] for each in (plain, preset))
        assert "(planned)" in before and "(by default" in after, name
    # What the plan decides is what the help calls planned.
    (train,) = parse(["train", "my_text.txt", "--minutes", "0.01", "--device", "cpu"])
    job = job_of(train, torch.device("cpu"))
    differs = {each.name for each in dataclasses.fields(TrainConfig) if getattr(job.recipe, each.name) != getattr(train.recipe, each.name)}
    differs |= {name for name in ("hidden_size", "num_hidden_layers", "vocab_size", "dropout") if getattr(job.config, name) != getattr(train.architecture, name)}
    assert differs <= set(Train.planned) and {"steps", "keep", "hidden_size"} <= differs


def test_what_a_figure_means():
    floors = {"unigram": 3.0, "bigram": 2.5, "xz": 2.2}
    assert "below bigram" in meaning(2.0, floors) and "xz" not in meaning(2.0, floors) and "xz" in meaning(2.4, floors)
    assert "between unigram and bigram" in meaning(2.7, floors) and "not below unigram" in meaning(3.1, floors)
