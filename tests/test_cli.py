"""The command line, as a person meets it."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import time
from typing import Annotated

import numpy as np
import pytest
import tyro

from gam_lm.cli.flag_errors import in_one_line
from gam_lm.cli.flag_list import flags_of
from gam_lm.cli.main import VERBS, parse, run, verb_class
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.attention_options import AttentionOptions
from gam_lm.mixers.registry import mixer_class, mixer_names, options_class
from gam_lm.presets.models import DEFAULT_MODEL, MODELS

TINY = ["--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--vocab-size", "270",
        "--context", "16", "--batch-size", "4", "--precision", "fp32", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(" ".join(rng.choice(["alpha", "beta", "gamma"], 9)) + "\n" for _ in range(600)))
    return path


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run(["train", "--data", str(text), "--out", str(out), "--steps", "3", *TINY]) == 0
    return out


def refused(capsys, arguments):
    """Run a command that must fail on the user's input; return its one line."""
    assert run(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("gam: ")]
    assert len(errors) == 1 and "Traceback" not in "\n".join(said)
    return errors[0]


def test_help_lists_every_verb_quickly():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gam_lm", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 5  # 0.1 s on a quiet machine; what counts is that nothing heavy is loaded
    assert all(verb in done.stdout for verb in VERBS) and "laptop" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_flags(verb, capsys):
    with pytest.raises(SystemExit) as done:
        run([*verb.split(" "), "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and ("--config" in said or "It has no flags." in said)


def test_a_preset_gives_the_defaults_and_flags_change_them():
    (verb,) = parse(["bench", "--preset", "laptop", "--out", "x", "--steps", "7"])
    assert (verb.recipe.steps, verb.recipe.batch_size, verb.architecture.hidden_size, verb.text.data) == (7, 8, 128, "stdlib")
    (verb,) = parse(["train", "--preset", "paper-wikitext2", "--out", "x", "--model", "mamba-paper", "--hidden-size", "64"])
    assert (verb.architecture.stack, verb.architecture.mamba.expand, verb.architecture.hidden_size, verb.recipe.blocks) == ("bare", 3, 64, "paper")


def test_the_paper_preset_is_table_1_whole():
    first, second = parse(["bench", "--preset", "paper", "--out", "x"])
    assert (first.text.data, second.text.data) == ("wikitext-2", "tinystories")
    assert first.models == ("gam-paper", "transformer-paper", "mamba-paper") and first.recipe.epochs == 5 and not first.match_parameters
    assert (second.text.train_rows, second.text.valid_rows) == (50_000, 5_000)
    assert (first.part, second.part) == ("wikitext2", "tinystories")  # folders below --out


def test_train_eval_and_generate_work_on_ones_own_text(trained, text, capsys):
    assert run(["eval", str(trained), "--data", str(text), "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["valid_nats_per_token"] > 0 and set(figures) == {f"valid_{n}" for n in ("nats_per_token", "ppl", "bits_per_byte", "word_ppl")}
    outputs = []
    for _ in range(2):
        assert run(["generate", str(trained), "--prompt", "alpha", "--max-new-tokens", "12", "--seed", "3", "--device", "cpu"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("alpha")


def test_the_time_left_of_a_bench_that_goes_on_is_that_of_what_is_missing(text, tmp_path, caplog, monkeypatch):
    command = ["bench", "--data", str(text), "--steps", "1", "--no-timing", "--out", str(tmp_path / "bench"), *TINY, "--models", "gam-static"]
    assert run(command) == 0
    monkeypatch.setattr("gam_lm.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO", "gam_lm")
    assert run([*command, "transformer"]) == 0
    there, trained = (line for line in caplog.messages if line.startswith("models: "))
    assert there == "models: 1/2 trainings, 0.0/s" and trained.startswith("models: 2/2 trainings, ") and trained.endswith(", 0 s left")


def test_bench_compares_models_and_goes_on_where_it_stopped(text, tmp_path, capsys):
    out = tmp_path / "bench"
    command = [
        "bench",
        "--data",
        str(text),
        "--models",
        "gam",
        "transformer",
        "mamba",
        "--steps",
        "4",
        "--validate-every",
        "2",
        "--out",
        str(out),
        *TINY,
    ]
    assert run([*command, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["model"] for row in plan] == [DEFAULT_MODEL, "transformer", "mamba"] and not out.exists()
    assert all(row["steps"] == 4 and row["train_tokens"] == 4 * 4 * 16 and row["expected_seconds"] >= 0 for row in plan)

    assert run(command) == 0
    content = json.loads((out / "results.json").read_text())
    rows = {row["model"]: row for row in content["rows"]}
    assert set(rows) == {"unigram", "bigram", "xz", DEFAULT_MODEL, "transformer", "mamba"}
    assert {row["train_tokens"] for row in rows.values() if not row.get("floor")} == {4 * 4 * 16}
    for name in (DEFAULT_MODEL, "transformer", "mamba"):
        assert [point["step"] for point in rows[name]["curve"]] == [2, 4]
        assert rows[name]["val_nats_per_token"] == rows[name]["curve"][-1]["val_nats"]
        assert rows[name]["state_bytes"] > 0 and rows[name]["tokens_per_second"] == pytest.approx(1000 * 4 * 16 / rows[name]["step_ms"])
        assert not (out / "runs" / f"{name}-seed0" / "state").exists()
    assert all((out / name).is_file() for name in ("table.md", "loss_curves.svg", "loss_curves.png"))

    lost = [row for row in content["rows"] if row["model"] != "mamba"]
    (out / "results.json").write_text(json.dumps(content | {"rows": lost}))
    shutil.rmtree(out / "runs" / "mamba-seed0")
    before = (out / "runs" / f"{DEFAULT_MODEL}-seed0" / "model.safetensors").stat().st_mtime_ns
    assert run(command) == 0
    again = {row["model"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert (out / "runs" / f"{DEFAULT_MODEL}-seed0" / "model.safetensors").stat().st_mtime_ns == before
    assert again["mamba"]["val_nats_per_token"] == rows["mamba"]["val_nats_per_token"]  # the same run once more


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown verb 'trian': did you mean 'train'"),
        (["data", "fetch"], "use `gam data prepare`"),
        (["train", "--preset", "laptap", "--out", "{out}"], "did you mean 'laptop'"),
        (["train", "--data", "{text}", "--model", "gam-statik", "--out", "{out}"], "did you mean 'gam-static'"),
        (["bench", "--data", "{text}", "--models", "mambo", "--out", "{out}", *TINY], "did you mean 'mamba'"),
        (["train", "--out", "{out}"], "data is not given"),
        (["train", "--data", "{out}/none.txt", "--out", "{out}", *TINY], "no such file or folder"),
        (["train", "--data", "{text}", "--out", "{out}", *TINY, "--context", "100000"], "needs 100001"),
        (
            ["train", "--data", "{text}", "--out", "{out}", *TINY, "--hidden-size", "15"],
            "num_heads is 2, which does not divide hidden_size=15",
        ),
        (["train", "--data", "{text}", "--out", "{text}", *TINY], "not empty and no run directory"),
        (["train", "--data", "{text}", "--out", "{trained}", "--steps", "9", *TINY], "holds another run"),
        (["bench", "--data", "{text}", "--out", "{trained}", *TINY], "which is the run directory of a training"),
        (["bench", "--data", "{text}", "--out", "{folder}", *TINY], "not empty and has no results.json"),
        (["eval", "{trained}", "--data", "{text}", "--split", "test", "--context", "100000"], "needs 100001"),
        (["eval", "{out}", "--data", "{text}"], "does not exist"),
        (["eval", "{trained}"], "data is not given"),
        (["generate", "{out}"], "does not exist"),
        (["generate", "{trained}", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "{trained}", "--device", "cuda:77"], "device is 'cuda:77'"),
        (["train", "--data", "tinystories", "--out", "{out}", *TINY], "gam data prepare tinystories"),
        (["train", "--data", "{text}", "--out", "{out}", *TINY[2:], "--hidden-size", "1000000000"], "the memory does not suffice"),
        (["generate", "{trained}", "--prompt", "a\ud800"], "prompt holds half of a surrogate pair or a byte that is no UTF-8 at character 2"),
        (["inspect", "trace", "{trained}", "--text", "ab\udcff", "--out", "{out}.json"], "text holds half of a surrogate pair"),
        (["data", "prepare", "{text}", "--vocab-size", "2147483647"], "vocab_size is 2147483647: a tokenizer of more than 16777216 entries"),
        (["data", "prepare", "/dev/null"], "which is neither a file nor a folder"),
        (["serve", "{trained}", "--host", "", "--port", "0"], "cannot listen on :0 (no address)"),
        (["serve", "{trained}", "--host", "\0", "--port", "0"], "cannot listen on"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, text, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    places = {"text": text, "trained": trained, "out": tmp_path / "new", "folder": text.parent}
    assert said in refused(capsys, [argument.format(**places) for argument in arguments])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --steps abc", "--steps is 'abc': use a whole number or None"),
        ("train --steps 3.5", "--steps is '3.5': use a whole number"),
        ("train --steps= --out x", "--steps is '': use a whole number"),
        ("train --steps", "--steps has no value: give it a whole number"),
        ("train --steps --out x", "--steps has no value"),
        ("train --out x --stepz 3", "unknown flag '--stepz' of gam train: did you mean '--steps'?"),
        ("train --batch_sise 3", "did you mean '--batch-size'?"),
        ("train -steps 3", "unknown flag '-steps' of gam train: did you mean '--steps'?"),
        ("train --write mean", "did you mean '--gam.write'?"),
        ("train --xyzzy", "unknown flag '--xyzzy' of gam train: `gam train --help-all` lists the flags"),
        ("train --gam.write some", "--gam.write is 'some': use none or mean or delta"),
        ("train --betas 0.9", "--betas is '0.9': give it 2 values, each a number"),
        ("train --betas 0.9 x", "--betas is 'x': use a number"),
        ("bench --seeds 0 1 x --out y", "--seeds is 'x': use a whole number"),
        ("bench --seeds 0 1", "--out is missing: give it (Folder for"),
        ("eval", "RUN_DIRECTORY is missing: give it (Run directory"),
        ("export run more", "unknown word 'more': gam export takes RUN_DIRECTORY and flags"),
        ("export run --portable 3", "unknown word '3': gam export takes RUN_DIRECTORY and flags; --portable has its value already, or takes none"),
        ("eval run --json=3", "--json is '3': it takes no value, write --json or --no-json"),
        ("eval run --device", "--device has no value: give it a text"),
        ("env more", "unknown word 'more': gam env takes flags alone"),
        ("bench --out x --seeds", "--seeds has no value: give it a whole number, or several"),
        ("recall --models --out x", "--models has no value: give it a text, or several"),
        ("train --tyro-print-completion csh", "use one of bash, zsh, tcsh, fish"),
        ("trian --steps 3", "unknown verb 'trian': did you mean 'train'?"),
        ("inspect slot run", "verb 'inspect slot' is not known: use"),
    ],
)
def test_words_that_are_no_command_are_one_line_with_flag_value_and_fix(command, said, capsys):
    assert said in refused(capsys, command.split(" "))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("GAM_LM_IMPORT", "{", "use a JSON list"), ("GAM_LM_IMPORT", "3", "use a JSON list"), ("GAM_LM_IMPORT", "[3]", "use a JSON list"),
        ("RANK", "x", "RANK is 'x'"), ("RANK", "-1", "RANK is '-1'"),
    ],
)  # fmt: skip
def test_an_environment_variable_that_makes_no_sense_is_named(variable, value, said, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    assert said in refused(capsys, ["models"])


@pytest.mark.parametrize(("size", "said"), [("y", "WORLD_SIZE is 'y'"), ("-1", "WORLD_SIZE is '-1'"), ("0", "WORLD_SIZE is '0'"), ("2", "MASTER_ADDR is not set")])
def test_a_launcher_that_says_too_little_is_named(size, said, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert said in refused(capsys, ["train", "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "1", *TINY])


def test_a_file_never_takes_the_place_of_a_folder(trained, text, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear reader")
    assert "it is a folder" in refused(capsys, ["read", str(trained), str(text), "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear reader" and len(list(tmp_path.glob("*mine*"))) == 1


def test_a_chat_in_another_encoding_is_one_line(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert "standard input is not UTF-8" in refused(capsys, ["chat", str(trained), "--device", "cpu"])


def test_a_config_that_is_nested_too_deeply_is_one_line(tmp_path, capsys):
    (tmp_path / "deep.toml").write_text("steps = " + "[" * 5000 + "]" * 5000)
    assert "is nested too deeply" in refused(capsys, ["train", "--config", str(tmp_path / "deep.toml")])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_nearest_flag(verb, capsys):
    found = flags_of(verb_class(verb), positional_required=VERBS[verb].positional)
    flag = next((each for each in found if not each.positional and len(each.name) > 3), None)
    if flag is None:
        assert verb in ("models", "env", "completion")
        return
    word = "--" + flag.name.replace("_", "-")
    assert refused(capsys, [*verb.split(), word + "z"]) == f"gam: unknown flag '{word}z' of gam {verb}: did you mean '{word}'?"


def test_what_the_parser_alone_refuses_is_its_own_text_on_one_line(capsys):
    @dataclasses.dataclass(frozen=True)
    class Odd:
        pair: Annotated[tuple[int, int], tyro.conf.arg(constructor=lambda pair: (_ for _ in ()).throw(ValueError("no pair\nat all")))] = (1, 2)

    flags = list(flags_of(Odd))
    with pytest.raises(InputError) as found, in_one_line("odd", flags, ["--pair", "1"]):
        tyro.cli(Odd, args=["--pair", "1"])
    assert "pair" in str(found.value) and "\n" not in str(found.value) and "│" not in str(found.value)
    assert capsys.readouterr().err == ""


def test_a_prompt_longer_than_the_positions_is_named(text, tmp_path, capsys):
    out = tmp_path / "run"
    learned = ["--positions", "learned", "--max-position-embeddings", "16"]
    assert run(["train", "--data", str(text), "--out", str(out), "--steps", "1", *TINY, *learned]) == 0
    assert "learned positions end at 16" in refused(capsys, ["generate", str(out), "--prompt", "alpha beta " * 50])


def test_an_interrupt_is_exit_code_130(monkeypatch):
    from gam_lm.cli.report import Env

    monkeypatch.setattr(Env, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(["env"]) == 130


def test_env_names_machine_and_backends(capsys):
    assert run(["env"]) == 0
    said = capsys.readouterr().out
    assert "torch: " in said and all(f"mixer {name}: {', '.join(mixer_class(name).backends)}" in said for name in mixer_names())


def test_data_prepare_describes_the_corpus(text, capsys):
    assert run(["data", "prepare", str(text), "--vocab-size", "270"]) == 0
    assert "train: " in capsys.readouterr().out


def test_the_models_are_printed_with_what_each_changes_and_its_source(capsys):
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(MODELS)
    assert all(each.says in line and each.source in line for each, line in zip(MODELS.values(), lines[2:], strict=True))


def test_every_option_of_every_mixer_is_a_flag_with_its_explanation(capsys):
    with pytest.raises(SystemExit):
        run(["train", "--help-all"])
    said = " ".join(capsys.readouterr().out.split())
    for name in mixer_names():
        for field in dataclasses.fields(options_class(name)):
            flag = f"--{name}.{field.name}".replace("_", "-")
            assert flag in said or f"--{name}.{'no-' if field.default is True else ''}{field.name}".replace("_", "-") in said, flag


def test_a_stack_of_several_mixers_is_trained_from_flags(text, tmp_path, capsys):
    out = tmp_path / "hybrid"
    flags = ["--mixers", "gam", "attention", "--attention.window", "5", "--attention.num-heads", "4", "--num-hidden-layers", "2"]
    assert run(["train", "--data", str(text), "--out", str(out), "--steps", "2", *TINY, *flags]) == 0
    config = ModelConfig.from_dict(json.loads((out / "config.json").read_text()))
    assert config.layer_mixers == ("gam", "attention")
    assert (config.options_of(AttentionOptions).window, config.options_of(AttentionOptions).num_heads) == (5, 4)
    assert run(["generate", str(out), "--prompt", "alpha", "--max-new-tokens", "12", "--seed", "3", "--device", "cpu"]) == 0
    assert "\nalpha" in capsys.readouterr().out


def test_options_of_a_mixer_that_is_not_there_are_refused(text, tmp_path, capsys):
    said = refused(capsys, ["train", "--data", str(text), "--out", str(tmp_path / "run"), *TINY, "--attention.window", "5"])
    assert "--attention.window is given, and mixers is ['gam']: leave it out, or add attention to --mixers" in said
