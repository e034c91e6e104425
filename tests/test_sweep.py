"""Several values of one number in `gam bench`: every model has each, the file repeats them, and the best is said."""

import json

import pytest
from small_runs import command, write_book

from gam_lm.cli.flag_list import flags_of
from gam_lm.cli.main import parse, run, verb_class
from gam_lm.cli.sweep import take_sweep

FLAGS = list(flags_of(verb_class("bench")))


@pytest.fixture
def book(tmp_path):
    return write_book(tmp_path)


def rows_of(out):
    return [row for row in json.loads((out / "results.json").read_text())["rows"] if not row.get("floor")]


@pytest.mark.parametrize(
    "words",
    [["--learning-rate", "1e-3", "--seeds", "0", "1"], ["--betas", "0.9", "0.95"], ["--learning-rate=1e-3", "--test"], ["--models", "gam", "llama"], []],
)
def test_words_of_one_value_each_stay_as_they_are(words):
    assert take_sweep(words, FLAGS) == (words, {})


def test_every_model_is_trained_with_every_value_and_the_best_is_said(book, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(command("bench", book, out, "--learning_rate", "1e-4", "0.05", "3e-3", "--seeds", "0", "1", "--no-timing")) == 0
    rows = rows_of(out)
    assert {(row["model"], row["train_config"]["learning_rate"], row["seed"]) for row in rows} == {
        (name, rate, seed) for name in ("gam", "transformer") for rate in (1e-4, 0.05, 3e-3) for seed in (0, 1)
    }
    assert all(row["swept"] == {"learning_rate": row["train_config"]["learning_rate"]} for row in rows)
    said = {line.split(": ")[0]: line for line in capsys.readouterr().out.splitlines() if ": best with " in line}
    for name in ("gam", "transformer"):
        mean = {rate: sum(row["val_nats_per_token"] for row in rows if row["model"] == name and row["swept"]["learning_rate"] == rate) / 2
                for rate in (1e-4, 0.05, 3e-3)}  # fmt: skip
        best = min(mean, key=mean.get)
        assert f"best with learning_rate={best:g}, {mean[best]:.4f} nats" in said[name]
        assert all(f"learning_rate={rate:g}: +{nats - mean[best]:.4f}" in said[name] for rate, nats in mean.items() if rate != best)
        word = {1e-4: "the lowest", 0.05: "the highest", 3e-3: None}[best]
        assert ("that was tried" not in said[name]) if word is None else (f"{word} that was tried" in said[name])


def test_a_number_of_the_model_and_one_of_the_recipe_are_combined_and_the_file_repeats_both(book, tmp_path, capsys):
    out = tmp_path / "out"
    words = command("bench", book, out, "--hidden-size", "8", "16", "--weight-decay", "0", "0.3", "--no-timing")
    assert run(words) == 0
    rows = rows_of(out)
    assert {(row["model"], row["model_config"]["hidden_size"], row["train_config"]["weight_decay"]) for row in rows} == {
        (name, width, decay) for name in ("gam", "transformer") for width in (8, 16) for decay in (0.0, 0.3)
    }
    assert len({row["parameters"] for row in rows if row["model"] == "gam"}) == 2
    said = [line.split(": best with ")[0] for line in capsys.readouterr().out.splitlines() if ": best with weight_decay=" in line]
    assert sorted(said) == sorted(f"{name} (hidden_size={width})" for name in ("gam", "transformer") for width in (8, 16))
    (typed,), (repeated,) = parse(words), parse(["bench", "--config", str(out / "run.toml")])
    assert repeated == typed and repeated.sweep == {"hidden_size": (8, 16), "weight_decay": (0.0, 0.3)}
    capsys.readouterr()
    assert run([*words, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["swept"] for row in planned[::2]] == [{"hidden_size": width, "weight_decay": decay} for width in (8, 16) for decay in (0.0, 0.3)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--learning-rate", "1e-3", "fast"], "learning_rate has 'fast' among its values"),
        (["--batch-size", "4", "4.5"], "batch_size has '4.5' among its values: write whole numbers"),
        (["--learning-rate", "1e-3", "-1"], "learning_rate is -1.0"),
        (["--dropout", "0", "2"], "dropout is 2.0"),
        (["--seed", "0", "1"], "seed has 2 values, 0 1: give one, --seeds"),
        (["--vocab-size", "300", "400"], "vocab_size has 2 values"),
        (["--learning-rate", "1e-3", "2e-3", "--primary", "gam:transformer"], "does not go with --primary"),
    ],
)
def test_what_cannot_be_swept_is_one_line_and_trains_nothing(more, said, book, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(command("bench", book, out, *more)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (out / "runs").exists()


def test_the_speed_of_a_row_is_that_of_its_own_batch_size(book, tmp_path, monkeypatch):
    import gam_lm.experiments.benchmark as benchmark

    def counted(steps, device, rounds):
        return {name: [1000.0 * (1 + place)] for place, name in enumerate(steps)}

    monkeypatch.setattr(benchmark, "interleaved_times", counted)
    words = command("bench", book, tmp_path / "out", "--learning-rate", "1e-3", "2e-3")
    place = words.index("--batch-size")
    assert run([*words[:place], "--batch-size", "2", "4", *words[place + 2 :]]) == 0
    rows = rows_of(tmp_path / "out")
    times = {(row["model"], row["train_config"]["batch_size"]): row["step_ms"] for row in rows}
    assert sorted(times.values()) == [1000, 2000, 3000, 4000] and len(rows) == 8  # the learning rate makes no step another one
    assert all(row["tokens_per_second"] * times[row["model"], size] == pytest.approx(1000 * size * 32) for row in rows for size in [row["train_config"]["batch_size"]])


def test_a_sweep_of_which_every_value_diverged_has_no_best(book, tmp_path, capsys):
    words = command("bench", book, tmp_path / "out", "--learning-rate", "1e30", "1e32", "--clip", "0", "--no-timing")
    words.remove("transformer")
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "every value diverged" in said and "inf" not in said


def test_the_test_split_is_added_to_rows_that_were_finished_without_it(book, tmp_path, caplog):
    def bench(out, *more):
        words = command("bench", book, tmp_path / out, "--no-timing", *more)
        words.remove("transformer")
        assert run(words) == 0
        (row,) = rows_of(tmp_path / out)
        return row

    whole, before = bench("whole", "--test"), bench("late")
    assert "test_nats_per_token" not in before
    late = bench("late", "--test")
    assert late["test_nats_per_token"] == pytest.approx(whole["test_nats_per_token"], abs=1e-9) and late["val_nats_per_token"] == before["val_nats_per_token"]
    assert (tmp_path / "late" / late["test_blocks"]).is_file()
    bench("gone")
    (tmp_path / "gone" / "runs" / "gam-seed0" / "recipe.json").unlink()
    assert "test_nats_per_token" not in bench("gone", "--test")
    assert "has no test loss, and its run cannot be measured" in caplog.text
