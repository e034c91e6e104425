"""The scaling law: what it was made with comes out, it says where it is not determined, and the loss by size and tokens is told model by model."""

import json
import math

import pytest
from small_runs import command, write_book

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.report.law import Law, Point, fit_law, law_plots, law_tables, points_of
from gam_lm.training.recipe import TrainConfig

MACHINE = {"device": "cpu", "processor": "Laptop A", "cores": 2, "torch": "2", "python": "3"}
CORPUS = {"name": "novels", "sha256": "ab" * 32, "tokens": 1000, "tokenizer": "bpe"}
LAW = Law(floor=1.7, of_parameters=400.0, alpha=0.34, of_tokens=410.0, beta=0.28, residuals=())
SIZES, HORIZONS = (0.4e6, 1.25e6, 4e6), (0.6e6, 2.4e6, 9.8e6)


def points(noise=lambda n, t: 0.0, skip=()):
    return [
        Point(size=f"{n:g}", parameters=int(n), tokens=int(t), loss=LAW.loss(int(n), int(t)) + noise(n, t)) for n in SIZES for t in HORIZONS if (n, t) not in skip
    ]


@pytest.mark.parametrize("skip", [(), ((SIZES[2], HORIZONS[2]), (SIZES[2], HORIZONS[1]), (SIZES[1], HORIZONS[2]))])
def test_the_law_that_made_the_points_is_found(skip):
    found = fit_law(points(skip=skip))
    assert found is not None
    assert [found.floor, found.alpha, found.beta] == pytest.approx([LAW.floor, LAW.alpha, LAW.beta], rel=2e-2)
    assert max(map(abs, found.residuals)) < 1e-4
    assert found.loss(2e7, 1e8) == pytest.approx(LAW.loss(2e7, 1e8), abs=0.01)


def test_residuals_are_measured_less_fitted_and_no_other_numbers_are_nearer():
    noisy = points(lambda n, t: 0.01 * math.sin(n + t))
    found = fit_law(noisy)
    assert found.residuals == pytest.approx([each.loss - found.loss(each.parameters, each.tokens) for each in noisy])

    def error(law):
        return sum((each.loss - law.loss(each.parameters, each.tokens)) ** 2 for each in noisy)

    assert error(found) <= error(LAW)
    for name in ("floor", "of_parameters", "alpha", "of_tokens", "beta"):
        for factor in (0.99, 1.01):
            assert error(found) <= error(Law(**{**vars(found), name: getattr(found, name) * factor})) + 1e-9


@pytest.mark.parametrize(
    "some",
    [
        points()[:5],  # two sizes
        [each for each in points() if each.tokens < 9e6],  # two horizons
        [Point(size=each.size, parameters=each.parameters, tokens=each.tokens, loss=4.0 + i) for i, each in enumerate(points())],  # larger is worse
    ],
)
def test_where_the_points_do_not_determine_it_there_is_none(some):
    assert fit_law(some) is None


def row(model, width, steps, nats, seed=0, rate=0.01, **columns):
    recipe = TrainConfig(seed=seed, steps=steps, learning_rate=rate).to_dict()
    return {
        "model": model, "seed": seed, "backend": "torch", "model_config": ModelConfig(vocab_size=64, hidden_size=width, num_hidden_layers=2).to_dict(),
        "train_config": recipe, "parameters": 100 * width * width, "train_tokens": 1000 * steps, "val_nats_per_token": nats, **columns,
    }  # fmt: skip


def results(*rows):
    return {"rows": list(rows), "environment": MACHINE, "corpus": CORPUS}


def grid(model, more):
    return [row(model, w, s, LAW.loss(100 * w * w, 1000 * s) + more, tokens_per_second=1000.0 / w) for w in (64, 128, 256) for s in (300, 1200, 4800)]


def test_cells_are_the_means_over_seeds_at_the_best_rate_and_what_diverged_is_left_out():
    rows = [
        row("gam", 64, 100, 4.0), row("gam", 64, 100, 4.2, seed=1), row("gam", 64, 100, 4.15, rate=0.1),
        row("gam", 128, 200, 3.9), row("gam", 128, 200, math.inf, seed=1, diverged=True), row("gam", 64, 200, 3.0, pruned=True),
    ]  # fmt: skip
    found = points_of(results(*rows))
    assert [(each.size, each.tokens, round(each.loss, 6)) for each in found["gam"]] == [("64 × 2", 100_000, 4.1), ("128 × 2", 200_000, 3.9)]


def test_tables_say_each_cell_the_difference_from_the_first_model_and_the_law():
    cells, laws = law_tables(results(*grid("gam", 0.0), *grid("llama", 0.1)[:-1]))
    assert cells.columns[3:] == ["0.3 M tokens", "1.2 M tokens", "4.8 M tokens"]
    named = {(line[0], line[1]): line[2:] for line in cells.rows}
    assert named["gam", "64 × 2"] == ["409,600", *(f"{LAW.loss(409_600, 1000 * s):.4f}" for s in (300, 1200, 4800))]
    assert named["llama − gam", "256 × 2"] == ["", "+0.1000", "+0.1000", ""]
    assert [line[:2] for line in laws.rows] == [["gam", "9"], ["llama", "8"]]
    assert float(laws.rows[0][3]) == pytest.approx(LAW.alpha, abs=0.01) and abs(float(laws.rows[0][6])) < 2e-3
    assert law_tables(results(*(each for each in grid("gam", 0.0) if each["train_tokens"] == 300_000))) == []
    two = [each for each in grid("gam", 0.0) if each["train_tokens"] < 4e6]
    assert law_tables(results(*two))[1].rows == [["gam", "6", "not determined", "not determined", "not determined", "", ""]]


def test_pictures_draw_tokens_and_seconds_where_these_were_measured(tmp_path):
    names = {path.name for path in law_plots(results(*grid("gam", 0.0)), tmp_path)}
    assert names == {"loss_by_tokens.svg", "loss_by_tokens.png", "loss_by_seconds.svg", "loss_by_seconds.png"}
    assert "gam 256 × 2" in (tmp_path / "loss_by_tokens.svg").read_text()
    untimed = [{key: value for key, value in each.items() if key != "tokens_per_second"} for each in grid("gam", 0.0)]
    assert {path.stem for path in law_plots(results(*untimed), tmp_path)} == {"loss_by_tokens"}
    assert law_plots(results(row("gam", 64, 100, 4.0)), tmp_path) == []


def test_a_bench_over_sizes_and_horizons_takes_the_rates_of_a_study_and_writes_the_table(book, tmp_path, caplog, capsys):
    study = tmp_path / "study"
    assert run(command("tune", book, study, "--trials", "2", "--widenings", "0", "--search", "learning_rate=1e-3:1e-2")) == 0
    caplog.clear()
    out = tmp_path / "out"
    words = command("bench", book, out, "--tuned", str(study), "--hidden-size", "8", "16", "--steps", "2", "4", "--no-timing")
    assert run(words) == 0 and "in the study" not in caplog.text  # what is swept is meant to differ
    best = {}
    for each in json.loads((study / "results.json").read_text())["rows"]:
        if "tuned" in each and (each["model"] not in best or each["val_nats_per_token"] < best[each["model"]]["val_nats_per_token"]):
            best[each["model"]] = each
    rows = [each for each in json.loads((out / "results.json").read_text())["rows"] if not each.get("floor")]
    assert len(rows) == 4 * len(best) and all(each["train_config"]["learning_rate"] == best[each["model"]]["tuned"]["learning_rate"] for each in rows)
    table = (out / "table.md").read_text()
    assert "by size and tokens" in table and "not determined" in table and (out / "loss_by_tokens.svg").is_file()
    words = command("bench", book, tmp_path / "other", "--tuned", str(study), "--learning-rate", "1e-3", "2e-3", "--no-timing")
    assert run(words) == 2 and "learning_rate has several values" in capsys.readouterr().err and not (tmp_path / "other" / "results.json").exists()


@pytest.fixture
def book(tmp_path):
    return write_book(tmp_path)
