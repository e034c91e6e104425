"""Tuning: the same trials for every model, whoever is interrupted, and the best of them for `gam bench --tuned`."""

import json
import math

import numpy as np
import pytest
from small_runs import command as small_command
from small_runs import write_book

import gam_lm.experiments.tune as tune_module
from gam_lm.cli.main import run
from gam_lm.errors import InputError
from gam_lm.experiments.search import Range, best_recipe, best_rows, edges, key_of, more_trials, not_among, numbered, points, stretch_points
from gam_lm.report.tune import study_table
from gam_lm.training.recipe import TrainConfig

SPACE = (Range("learning_rate", 1e-3, 1.6e-2),)


def command(*args):
    """With the optimiser of one learning rate."""
    return [*small_command(*args), "--optimizer", "adamw"]


@pytest.fixture
def book(tmp_path):
    return write_book(tmp_path)


def rows_of(out):
    return [row for row in json.loads((out / "results.json").read_text())["rows"] if "tuned" in row]


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_points_of_a_study_fill_the_space_and_depend_on_the_seed_alone(d):
    space = [Range(field, 1.0, 10.0) for field in ("learning_rate", "muon_learning_rate", "weight_decay")[:d]]
    found = points(space, 64, 5)
    assert found[:10] == points(space, 10, 5) != points(space, 10, 6)
    shares = np.log10([[values[each.field] for each in space] for values in found])
    assert ((shares >= 0) & (shares <= 1)).all()
    for share in shares.T:  # every eighth of every range is tried
        assert np.histogram(share, 8, (0, 1))[0].min() >= 4


def test_a_best_value_at_an_edge_widens_the_range_beyond_it():
    tried = points(SPACE, 5, 0)
    values = sorted(point["learning_rate"] for point in tried)
    inner, lowest, highest = ({"learning_rate": value} for value in (values[2], values[0], values[-1]))
    assert edges(SPACE, tried, [inner, inner]) == []
    (below,) = edges(SPACE, tried, [inner, lowest])
    assert below.high < values[0] and below.low == pytest.approx(values[0] / 2)
    (above,) = edges(SPACE, tried, [highest, inner])
    assert above.low > values[-1] and above.high == pytest.approx(2 * values[-1])
    assert more_trials(SPACE, above, 5) == math.ceil(5 * 0.75 / 4)


@pytest.mark.parametrize("text", ["learning_rat=1:2", "learning_rate", "learning_rate=1", "learning_rate=2:1", "learning_rate=0:1", "learning_rate=a:b", "steps=1:2"])
def test_a_range_that_cannot_be_searched_is_refused_in_one_line(text):
    with pytest.raises(InputError) as error:
        Range.parse(text)
    assert "\n" not in str(error.value)


def test_every_model_gets_the_same_trials_and_bench_takes_the_best(book, tmp_path, capsys):
    out = tmp_path / "study"
    assert run(command("tune", book, out, "--trials", "3", "--widenings", "0")) == 0
    rows = rows_of(out)
    by_model = {name: {row["trial"]: row["tuned"] for row in rows if row["model"] == name} for name in ("gam", "transformer")}
    assert by_model["gam"] == by_model["transformer"] and sorted(by_model["gam"]) == [0, 1, 2]
    assert {row["seed"] for row in rows} == {1000}
    assert run(command("bench", book, tmp_path / "bench", "--tuned", str(out), "--no-timing")) == 0
    measured = {row["model"]: row for row in json.loads((tmp_path / "bench/results.json").read_text())["rows"] if "train_config" in row}
    for name, best in best_rows(rows).items():
        assert measured[name]["train_config"]["learning_rate"] == best["tuned"]["learning_rate"]
        assert measured[name]["seed"] == 0
    assert (out / "tune.svg").is_file()
    table = study_table(json.loads((out / "results.json").read_text())).markdown()
    assert table == (out / "table.md").read_text() and "| gam |" in table


def test_an_interrupted_study_goes_on_as_the_same_study(book, tmp_path, monkeypatch, caplog):
    tune = tune_module
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(command("tune", book, whole, "--trials", "3", "--widenings", "1")) == 0
    train, calls = tune.train_row, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(tune, "train_row", interrupted)
    assert run(command("tune", book, cut, "--trials", "3", "--widenings", "1")) == 130
    assert len(rows_of(cut)) == 2
    monkeypatch.setattr("gam_lm.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO", "gam_lm")
    assert run(command("tune", book, cut, "--trials", "3", "--widenings", "1")) == 0
    # The two trials of before count to what is done, and not to the rate.
    assert "trials: 2/6 trials, 0.0/s" in caplog.messages

    def said(out):
        return sorted((row["model"], row["trial"], row["tuned"]["learning_rate"], row["val_nats_per_token"]) for row in rows_of(out))

    assert said(cut) == said(whole)


def test_a_point_of_a_process_that_has_widened_already_is_trained_as_well(book, tmp_path):
    import optuna

    out = tmp_path / "out"
    assert run(command("tune", book, out, "--trials", "2", "--widenings", "0")) == 0
    ahead = optuna.load_study(storage=f"sqlite:///{out / 'study.db'}", study_name="gam")
    ahead.enqueue_trial({"learning_rate": 0.0123}, user_attrs={"index": 7})
    assert run(command("tune", book, out, "--trials", "2", "--widenings", "0")) == 0
    tried = {row["trial"]: row["tuned"]["learning_rate"] for row in rows_of(out) if row["model"] == "gam"}
    assert sorted(tried) == [0, 1, 7] and tried[7] == 0.0123


def test_a_trial_is_taken_by_one_process_alone_and_trained_beside_the_others(book, tmp_path, monkeypatch):
    import optuna
    from filelock import FileLock, Timeout

    out, held, ask, train = tmp_path / "out", [], optuna.Study.ask, tune_module.train_row

    def looked(what, moment):
        def wrapped(*args, **kwargs):
            try:
                with FileLock(out / ".enqueue.lock", timeout=0):
                    held.append((moment, False))
            except Timeout:
                held.append((moment, True))
            return what(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(optuna.Study, "ask", looked(ask, "asks"))
    monkeypatch.setattr(tune_module, "train_row", looked(train, "trains"))
    assert run(command("tune", book, out, "--trials", "1", "--widenings", "0")) == 0
    assert held == [("asks", True), ("trains", False)] * 2


def test_a_model_that_the_study_does_not_have_is_named(tmp_path):
    with pytest.raises(InputError, match="no finished trial of 'mamba': it has gam"):
        best_recipe([{"model": "gam", "tuned": {"learning_rate": 0.1}, "val_nats_per_token": 1.0}], "mamba", TrainConfig(), tmp_path)


def test_diverged_and_pruned_trials_are_counted_and_never_the_best():
    row = {"model": "gam", "seed": 1000, "train_config": {"optimizer": "adamw"}}
    rows = [
        {**row, "trial": 0, "tuned": {"learning_rate": 0.1}, "diverged": True}, {**row, "trial": 1, "tuned": {"learning_rate": 0.2}, "pruned": True},
        {**row, "trial": 2, "tuned": {"learning_rate": 0.3}, "val_nats_per_token": 4.0},
    ]  # fmt: skip
    assert best_rows(rows)["gam"]["trial"] == 2
    (line,) = study_table({"rows": rows, "corpus": {"name": "books"}}).rows
    assert line[:3] == ["gam", "3 (1 diverged, 1 pruned)", "0.3"]


def test_another_study_in_the_same_folder_is_refused_in_one_line_and_more_trials_or_models_go_on(book, tmp_path, capsys):
    out = tmp_path / "out"

    def tune(*more, models=("gam",), steps="3", out=out):
        words = command("tune", book, out, "--widenings", "0", *more)
        words[words.index("--steps") + 1] = steps
        start = words.index("--models") + 1
        words[start : start + 2] = models
        return run(words)

    assert tune("--trials", "2") == 0
    for said, refused in (
        ("steps of the recipe is 4, and the trials in", lambda: tune("--trials", "2", steps="4")),
        ("hidden_size of the gam is 16", lambda: tune("--trials", "2", "--hidden-size", "16")),
        ("seed of the recipe is 7", lambda: tune("--trials", "2", "--seed", "7")),
        ("search is of weight_decay, and the trials in", lambda: tune("--trials", "2", "--search", "weight_decay=0.01:1")),
        ("of other ranges or another seed", lambda: tune("--trials", "2", "--search", "learning_rate=1e-3:1e-2")),
        ("prune is True", lambda: tune("--prune")),
        ("2 finished trials (gam) that", lambda: tune("--trials", "2", "--storage", f"sqlite:///{out / 'study.db'}", out=tmp_path / "other")),
    ):
        capsys.readouterr()
        assert refused() == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    assert len(rows_of(out)) == 2
    assert tune("--trials", "3", models=("gam", "transformer")) == 0
    tried = {(row["model"], row["trial"]): row["tuned"] for row in rows_of(out)}
    assert tried == {(name, i): values for name in ("gam", "transformer") for i, values in enumerate(points(SPACE, 3, 1000))}


def test_points_that_were_asked_for_are_tried_whatever_a_widening_has_taken_and_every_model_gets_all(book, tmp_path, capsys):
    out = tmp_path / "out"
    alone = command("tune", book, out, "--trials", "2", "--widenings", "1")
    alone.remove("transformer")
    assert run(alone) == 0
    before = {row["trial"]: row["tuned"] for row in rows_of(out)}
    assert len(before) > 2
    assert run(command("tune", book, out, "--trials", "5", "--widenings", "0")) == 0
    tried = {name: {row["trial"]: row["tuned"] for row in rows_of(out) if row["model"] == name} for name in ("gam", "transformer")}
    assert tried["gam"] == tried["transformer"] and before.items() <= tried["gam"].items()
    assert all(values in tried["gam"].values() for values in points(SPACE, 5, 1000))


def test_a_model_that_joins_has_all_points_of_the_others_waiting_at_once(book, tmp_path, monkeypatch):
    """So that several processes need not wait for each other at every widening."""
    out = tmp_path / "out"
    alone = command("tune", book, out, "--trials", "2", "--widenings", "1")
    alone.remove("transformer")
    assert run(alone) == 0
    points_there = {key_of(row["tuned"]) for row in rows_of(out)}
    plans, run_all = [], tune_module._run_all
    monkeypatch.setattr(tune_module, "_run_all", lambda study, plan, *rest: (plans.append({key_of(each) for each in plan}), run_all(study, plan, *rest))[1])
    assert run(command("tune", book, out, "--trials", "2", "--widenings", "1")) == 0
    assert plans[0] == points_there and len(points_there) > 2


def test_a_stretch_that_other_models_tried_is_taken_over_and_a_repeated_study_draws_its_own_points_again():
    base = points(SPACE, 3, 0)
    stretch, drawn = Range("learning_rate", 0.02, 0.04), [{"learning_rate": 0.03}]
    other = [*enumerate(base), (3, {"learning_rate": 0.025})]
    assert stretch_points(stretch, drawn, base, other) == [{"learning_rate": 0.025}]
    assert stretch_points(stretch, drawn, base, [*other, (4, {"learning_rate": 0.03})]) == drawn
    assert stretch_points(stretch, drawn, base, list(enumerate(base))) == drawn
    assert numbered([*base, *drawn], [*other, (3, {"learning_rate": 0.5})]) == [*enumerate(base), (4, drawn[0])]
    assert not_among(other, base) == [{"learning_rate": 0.025}]


@pytest.mark.parametrize("text", ["cooldown=0.5:2", "epochs=1:1e10"])
def test_a_range_that_the_recipe_does_not_take_is_refused_before_a_trial(text):
    with pytest.raises(InputError, match=f"^search is '{text}', and "):
        Range.parse(text)


def test_a_widening_ends_at_the_bound_of_the_recipe():
    space = [Range("cooldown", 0.1, 1.0)]
    (inside,) = edges(space, [{"cooldown": 0.3}, {"cooldown": 0.6}], [{"cooldown": 0.6}])
    assert inside.high == pytest.approx(1) and all(TrainConfig(**values).cooldown <= 1 for values in points([inside], 50, 0))
    assert edges(space, [{"cooldown": 0.3}, {"cooldown": 0.9}], [{"cooldown": 0.9}]) == []


def test_a_trial_is_never_given_up_at_its_last_validation():
    class Trial:
        reported = 0

        def report(self, value, step):
            self.reported += 1

        def should_prune(self):
            return True

    trial = Trial()
    watch = tune_module._Watch(trial, 10)
    watch.log({"val_nats": 4.0}, 10)
    with pytest.raises(tune_module.optuna.TrialPruned):
        watch.log({"val_nats": 4.0}, 5)
    assert trial.reported == 2


def test_unequal_trials_are_said_below_the_table():
    def table(*trials):
        rows = [
            {"model": name, "seed": 1000, "trial": i, "tuned": {"learning_rate": rate}, "val_nats_per_token": 4.0, "train_config": {"optimizer": "adamw"}}
            for name, i, rate in trials
        ]
        return study_table({"rows": rows, "corpus": {"name": "books"}})

    assert table(("gam", 0, 0.1), ("llama", 0, 0.1)).note.startswith("Every model has the same values at the same trial number.")
    assert "do not have the same trials** (gam 2, llama 1 values)" in table(("gam", 0, 0.1), ("gam", 1, 0.2), ("llama", 0, 0.1)).note
    assert "same trials** (gam 1, llama 1 values)" in table(("gam", 0, 0.1), ("llama", 0, 0.2)).note


def test_bench_takes_no_study_of_another_text_and_says_what_else_differs(book, tmp_path, capsys, caplog):
    out = tmp_path / "study"
    assert run(command("tune", book, out, "--trials", "2", "--widenings", "0")) == 0
    words = command("bench", book, tmp_path / "bench", "--tuned", str(out), "--no-timing", "--dry-run")
    assert run(words) == 0 and "--tuned" not in caplog.text
    words[words.index("--hidden-size") + 1] = "16"
    assert run(words) == 0
    error = "".join(record.message for record in caplog.records if "--tuned" in record.message)
    assert "hidden_size is 8 in the study and 16 here (gam, transformer)" in error and "learning_rate" not in error and "seed" not in error
    book.write_text(book.read_text() + "another end\n")
    capsys.readouterr()
    assert run(words) == 2 and "a study on another text" in capsys.readouterr().err
