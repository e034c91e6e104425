"""Tuning: the same trials for every model, whoever is interrupted, and the best of them for `gam bench --tuned`."""

import json
import math

import numpy as np
import pytest
from small_runs import command, write_book

from gam_lm.cli.main import run
from gam_lm.errors import InputError
from gam_lm.experiments.search import Range, best_recipe, best_rows, edges, more_trials, points
from gam_lm.report.tune import study_table
from gam_lm.training.recipe import TrainConfig

SPACE = (Range("learning_rate", 1e-3, 1.6e-2),)


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


def test_an_interrupted_study_goes_on_as_the_same_study(book, tmp_path, monkeypatch):
    import gam_lm.experiments.tune as tune

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
    assert run(command("tune", book, cut, "--trials", "3", "--widenings", "1")) == 0

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
