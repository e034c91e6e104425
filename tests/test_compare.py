"""`gam compare`: which models, in which words, and what is never compared."""

import json
import math
import re

import numpy as np
import pytest
from test_cli import TINY

from gam_lm.cli.main import run
from gam_lm.errors import InputError
from gam_lm.report import seed_plot
from gam_lm.report.compare import find, over_the_lowest, primary_pairs
from gam_lm.report.plots import save
from gam_lm.report.sections import differences
from gam_lm.report.tables import curves, quality
from gam_lm.report.verdict import compare
from gam_lm.results import Results, read_blocks, read_documents, write_blocks

TOKENS = np.array([256] * 99 + [40])
DOCUMENTS = np.repeat(np.arange(5), 20)
CORPUS = {"name": "novels", "sha256": "ab" * 32, "tokens": 1000, "bytes": 4000, "tokenizer": "bpe", "tokenizer_sha256": "cd"}
MACHINE = {"device": "cpu", "processor": "x", "cores": 2, "memory_gb": 8, "python": "3.11", "torch": "2.9", "commit": None, "dirty": None}


def written(directory, models, corpus=CORPUS, seeds=(0, 1, 2), documents=DOCUMENTS, noise=0.001, splits=("val",), extra=(), **content):
    """A results.json of models with these losses. Returns its folder."""
    rows = []
    for number, (name, nats) in enumerate(models.items()):
        for seed in seeds:
            row = {"model": name, "seed": seed, "model_config": {"hidden_size": 8}, "parameters": 10, "state_bytes": 64}
            for split in splits:
                own = np.random.default_rng((number, seed)).normal(size=len(TOKENS)) + np.random.default_rng((number, seed, 1)).normal()
                losses = nats + np.random.default_rng(seed).normal(size=len(TOKENS)) * 0.1 + own * noise
                blocks = write_blocks(directory, f"{name.replace(':', '-')}-seed{seed}-{split}", losses * TOKENS, TOKENS, documents)
                row |= {f"{split}_blocks": blocks, f"{split}_nats_per_token": float((losses * TOKENS).sum() / TOKENS.sum())}
            rows.append(row)
    content = {"command": "gam bench", "environment": MACHINE, "corpus": corpus, **content, "rows": [*rows, *extra]}
    (directory / "results.json").write_text(json.dumps(content))
    return str(directory)


def said_by(capsys, *arguments):
    assert run(["compare", *arguments]) == 0
    return capsys.readouterr().out


def test_one_paragraph_says_the_difference_its_interval_and_where_that_comes_from(tmp_path, capsys):
    place = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2})
    said = said_by(capsys, f"{place}:gam", f"{place}/results.json:mamba")
    (lower, low, high) = map(float, re.match(r"gam is lower than mamba by ([\d.]+) nats per token \(95 % interval ([\d.]+) to ([\d.]+);", said).groups())
    assert lower == pytest.approx(0.2, abs=0.01) and low < lower < high and said.count("\n") == 1
    assert "3 seeds, widest over seeds" in said and "5 documents" in said
    assert "Holm" not in said and "No loss" not in said


def test_folders_files_and_models_are_taken(tmp_path):
    first, second = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2}), written(tmp_path / "b", {"gam": 5.0, "mamba": 5.1})
    third = written(tmp_path / "c", {"hf:llama": 5.4})
    assert [(each.a, each.b) for each in compare([f"{first}:gam", first]).comparisons] == [("gam", "mamba")]  # with the other model of its folder
    assert [(each.a, each.b) for each in compare([first]).comparisons] == [("gam", "mamba")]
    same = compare([first, second]).comparisons
    assert [each.a for each in same] == [f"gam of {first}", f"mamba of {first}"]
    three = compare([f"{first}:gam", f"{second}:mamba", f"{third}:hf:llama"]).comparisons
    assert [(each.a, each.b) for each in three] == [("gam", "mamba"), ("gam", "hf:llama"), ("mamba", "hf:llama")]


def test_the_picture_has_every_seed_of_every_model_and_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    first, second = written(tmp_path / "a", {"mamba": 5.2, "gam": 5.0}), written(tmp_path / "b", {"gam": 4.0}, seeds=(0, 1))
    drawn = []
    monkeypatch.setattr(seed_plot, "save", lambda figure, stem: drawn.append(figure) or save(figure, stem))
    assert run(["compare", first, second, "--plot", str(tmp_path / "new" / "plot")]) == 0
    assert (tmp_path / "new" / "plot.svg").exists() and "plot.png" in capsys.readouterr().err
    [axes] = drawn[0].axes
    assert [each.get_text() for each in axes.get_yticklabels()] == ["gam", "mamba"]
    seeds, means, lower_seeds, lower_means = axes.get_lines()
    rows = {(row["model"], row["seed"]): row["val_nats_per_token"] for row in find(first)[0].rows + find(first)[1].rows}
    assert sorted(seeds.get_xdata()) == sorted(rows.values()) and len(lower_seeds.get_xdata()) == 2
    assert sorted(means.get_xdata()) == pytest.approx(sorted(np.mean([rows[name, seed] for seed in range(3)]) for name in ("gam", "mamba")))
    for line, mean in ((seeds, means), (lower_seeds, lower_means)):
        assert set(line.get_ydata()) == set(mean.get_ydata()) and line.get_color() == mean.get_color()
    assert [each.get_text() for each in axes.get_legend().get_texts()] == ["a", "b"]
    same = [written(tmp_path / parent / "a", {"gam": 5.0}) for parent in ("one", "other")]
    seed_plot.seed_plot(same, tmp_path / "plot")
    assert [each.get_text() for each in drawn[1].axes[0].get_legend().get_texts()] == ["one/a", "other/a"]  # one name twice tells nothing


def test_the_json_has_what_the_paragraph_says(tmp_path, capsys):
    place = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2})
    found = json.loads(said_by(capsys, place, "--json"))
    (one,) = found["comparisons"]
    assert (one["a"], one["b"], one["seeds"], one["documents"], one["level"], one["shown"]) == ("gam", "mamba", 3, 5, 0.95, True)
    assert set(one["half_widths"]) == {"seeds", "seeds and blocks", "documents", "seeds and documents"}
    assert one["half_widths"][one["widest"]] == max(one["half_widths"].values()) == pytest.approx((one["high"] - one["low"]) / 2)
    assert one["low"] < one["difference"] < one["high"] and one["p_value"] < 0.05 and found["paragraph"].startswith("gam is lower")


def test_what_was_named_primary_before_the_runs_carries_no_correction_and_the_others_do(tmp_path):
    models = {"gam": 5.0, "llama": 5.2, "mamba": 5.1}
    place = written(tmp_path / "a", models, noise=0.01, primary=[["llama", "gam"]], margin=0.02)
    named = {(each.a, each.b): each for each in compare([place]).comparisons}
    assert named["llama", "gam"].primary == "before the runs" and named["llama", "gam"].found.level == 0.95
    others = [each for pair, each in named.items() if pair != ("llama", "gam")]
    assert [each.primary for each in others] == [None, None] and max(each.found.level for each in others) == 0.975
    alone = compare([f"{place}:llama", f"{place}:mamba"]).comparisons[0]
    assert named["llama", "mamba"].found.half_width >= alone.found.half_width and named["llama", "mamba"].p_value >= alone.p_value
    assert named["llama", "gam"].margin == 0.02 and [each.margin for each in others] == [None, None]
    said = compare([place]).paragraph()
    assert "gam is lower than llama" in said and "No loss of llama cannot be claimed" in said  # the one that was named first, in whatever order the rows are
    assert "named primary before the runs" in said and "2 comparisons that were not named primary are widened by Holm's correction" in said
    now = compare([place], primary=["gam:mamba"])
    assert [each.primary for each in now.comparisons] == ["before the runs", "with this command", None] and now.corrected == 1


def test_no_loss_is_claimed_below_the_margin_alone(tmp_path):
    place = written(tmp_path / "a", {"gam": 5.0, "llama": 5.0}, noise=0.003)
    (one,) = compare([place], margin=0.02).comparisons
    upper = one.found.mean + one.found.half_width
    assert 0 < upper < 0.02 and one.no_loss
    assert "gam shows no loss against llama" in compare([place], margin=0.02).paragraph()
    (one,) = compare([place], margin=upper / 2).comparisons
    assert one.no_loss is False and "No loss of gam cannot be claimed" in compare([place], margin=upper / 2).paragraph()
    assert compare([place]).comparisons[0].no_loss is None
    saved = written(tmp_path / "c", {"gam": 5.0, "llama": 5.0}, noise=0.003, margin=0.02)  # for a primary comparison, of which this is none
    assert compare([saved]).comparisons[0].no_loss is None
    worse = written(tmp_path / "b", {"gam": 5.1, "llama": 5.0})
    assert compare([worse], margin=0.02).comparisons[0].no_loss is False


def test_a_model_of_one_seed_is_described_and_not_compared(tmp_path):
    place = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.5}, seeds=(3,))
    (one,) = compare([place], margin=0.02).comparisons
    assert one.to_json()["low"] is None and one.to_json()["shown"] is None and one.no_loss is None
    said = compare([place]).paragraph()
    assert "does not compare the models" in said and "lower" not in said and "interval" not in said
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [line[4] for line in quality(results, tmp_path / "a").rows] == ["lowest", f"{-one.found.mean:+.4f} (one seed)"]


def test_results_that_do_not_tell_documents_say_so_and_one_that_does_is_enough(tmp_path):
    old = written(tmp_path / "old", {"gam": 5.0, "mamba": 5.2}, documents=None)
    said = compare([old]).paragraph()
    assert "do not say to which document" in said and "over documents" not in said
    new = written(tmp_path / "new", {"llama": 5.3})
    (one,) = compare([f"{old}:gam", new]).comparisons
    assert one.found.documents == 5 and "documents" in {each.over for each in one.found.estimates}
    single = written(tmp_path / "single", {"gam": 5.0, "mamba": 5.2}, documents=np.zeros(len(TOKENS)))
    assert "the text is one document" in compare([single]).paragraph()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "results.json").write_text((tmp_path / "old" / "results.json").read_text())  # without the folder blocks/
    bare = compare([str(tmp_path / "bare")]).paragraph()
    assert "losses by block are not saved" in bare and "lack the losses by block" not in bare


def test_the_test_split_is_compared_on_its_own_blocks(tmp_path, capsys):
    place = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2}, splits=("val", "test"))
    assert "of test loss" in said_by(capsys, place, "--split", "test")
    assert run(["compare", written(tmp_path / "b", {"gam": 5.0, "mamba": 5.2}), "--split", "test"]) == 2
    assert "have no test loss" in capsys.readouterr().err


DIVERGED = {"model": "mamba", "seed": 2, "model_config": {"hidden_size": 8}, "parameters": 10, "diverged": True}


@pytest.mark.parametrize("extra", [DIVERGED, DIVERGED | {"diverged": False, "val_nats_per_token": math.nan}, DIVERGED | {"val_nats_per_token": 0.1}], ids=["flag", "nan", "low"])
def test_what_diverged_is_said_and_never_compared_nor_lowest(tmp_path, extra):
    place = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2}, seeds=(0, 1), extra=[extra])
    (one,) = compare([place]).comparisons
    assert one.found.count == 2 and one.found.mean == pytest.approx(-0.2, abs=0.01)
    assert "1 of 3 trainings of mamba diverged (seed 2) and is not compared" in compare([place]).paragraph()
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    rows = {line[0]: line for line in quality(results, tmp_path / "a").rows}
    assert rows["gam"][4] == "lowest" and float(rows["mamba"][4].split(" ")[0]) == pytest.approx(0.2, abs=0.01)
    assert rows["mamba"][-1] == "3 (1 diverged)"
    assert float(rows["mamba"][3].split(" ")[0]) == pytest.approx(5.2, abs=0.1)


@pytest.mark.parametrize("loss", [{}, {"val_nats_per_token": math.nan, "val_ppl": math.nan}], ids=["none", "nan"])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_all_of_whose_trainings_diverged_is_shown_as_such(tmp_path, capsys, loss, first):
    gone = [DIVERGED | {"model": "a-gone", "seed": seed} | loss for seed in (0, 1, 2)]
    place = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2}, extra=gone)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    if first:
        results["rows"] = results["rows"][-3:] + results["rows"][:-3]
        (tmp_path / "a" / "results.json").write_text(json.dumps(results))
    rows = {line[0]: line for line in quality(results, tmp_path / "a").rows}
    assert rows["a-gone"][3] == "diverged" and rows["a-gone"][4] == "" and rows["gam"][4] == "lowest"
    assert not any("nan" in cell for line in rows.values() for cell in line)
    assert curves(results).rows == []
    lowest, over = over_the_lowest(find(place))
    assert lowest == "gam" and set(over) == {"mamba"}
    assert "3 of 3 trainings of a-gone diverged (seed 0, 1, 2) and are not compared" in compare([place]).paragraph()
    assert len(compare([place]).comparisons) == 1
    assert run(["compare", f"{place}:gam", f"{place}:a-gone"]) == 2
    assert "a-gone diverged" in capsys.readouterr().err


def test_where_all_diverged_nothing_is_the_lowest(tmp_path):
    rows = [DIVERGED | {"model": name, "seed": seed} for name in ("a", "b") for seed in (0, 1)]
    written(tmp_path / "a", {"gam": 5.0})
    content = {"command": "", "environment": MACHINE, "corpus": CORPUS, "rows": rows}
    (tmp_path / "a" / "results.json").write_text(json.dumps(content))
    assert over_the_lowest(find(str(tmp_path / "a"))) == ("", {})
    assert [line[3:5] for line in quality(content, tmp_path / "a").rows] == [["diverged", ""]] * 2


@pytest.mark.parametrize(
    ("second", "said"),
    [("{b}:gma", "did you mean 'gam'"), ("{other}:gam", "another text"), ("{seeds}:gam", "no seed in common"), ("{none}", "no such file"),
     ("{else}", "name one model of each"), ("{b}:gam --margin -1", "margin is -1.0"), ("{b}:mamba --primary gam:mabma", "did you mean 'mamba'"),
     ("{b}:mamba --primary gam:gam", "with itself"), ("{b}:mamba --primary gam", "use MODEL:MODEL")],
)  # fmt: skip
def test_what_cannot_be_compared_is_named(second, said, tmp_path, capsys):
    places = {
        "b": written(tmp_path / "b", {"gam": 5.0, "mamba": 5.0}), "none": tmp_path / "none",
        "else": written(tmp_path / "else", {"x": 5.0, "y": 5.0}),
        "other": written(tmp_path / "other", {"gam": 5.0}, CORPUS | {"sha256": "other"}),
        "seeds": written(tmp_path / "seeds", {"gam": 5.0}, seeds=(7, 8)),
    }  # fmt: skip
    first = written(tmp_path / "a", {"gam": 5.0, "delta": 5.0}) + (":gam" if ":" in second else "")
    assert run(["compare", first, *second.format(**places).split(" ")]) == 2
    assert said in capsys.readouterr().err


def test_primary_names_are_split_where_both_sides_are_known():
    assert primary_pairs(["gam:hf:llama", "hf:llama:gam"], ["gam", "hf:llama"]) == [("gam", "hf:llama"), ("hf:llama", "gam")]
    with pytest.raises(InputError, match="at most 3"):
        primary_pairs(["a:b", "a:c", "b:c", "b:a"], ["a", "b", "c"])


def test_primary_comparisons_are_named_before_the_first_training_and_not_after(tmp_path):
    def opened():
        return Results.open(tmp_path / "results.json", command="gam bench", environment=MACHINE, corpus=CORPUS)

    opened().add({"model": "unigram", "floor": True})
    opened().name_primary([("gam", "mamba")], 0.02)
    opened().add({"model": "gam", "seed": 0})
    opened().name_primary([("gam", "mamba")], 0.02)
    opened().name_primary([], None)
    opened().name_primary([("gam", "llama")], 0.02)  # of which one is not trained yet
    opened().add({"model": "llama", "seed": 0})
    opened().add({"model": "mamba", "seed": 0})
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["primary"] == [["gam", "mamba"], ["gam", "llama"]] and content["margin"] == 0.02 and len(content["rows"]) == 4
    late = ([("mamba", "llama")], None, "primary is mamba:llama, and both were trained"), ([], 0.05, "margin is 0.05, and 0.02 was named")
    for pairs, margin, said in (*late, ([("gam", "a"), ("gam", "b")], None, "names 4 comparisons")):
        with pytest.raises(InputError, match=said):
            opened().name_primary(pairs, margin)
    assert json.loads((tmp_path / "results.json").read_text()) == content


def test_bench_saves_test_blocks_documents_and_what_was_named_before(tmp_path, capsys):
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(80):
        (text / f"{number}.txt").write_text(" ".join(np.random.default_rng(number).choice(["alpha", "beta", "gamma"], 120)))
    out = tmp_path / "out"
    command = ["bench", "--data", str(text), "--models", "gam", "transformer", "--seeds", "0", "1", "--steps", "2", "--test", "--out", str(out), *TINY]
    assert run([*command, "--primary", "gam:tranformer"]) == 2 and "did you mean 'transformer'" in capsys.readouterr().err and not out.exists()
    assert run([*command, "--primary", "gam:transformer", "--margin", "0.02"]) == 0
    results = json.loads((out / "results.json").read_text())
    names = list(dict.fromkeys(row["model"] for row in results["rows"] if not row.get("floor")))
    assert results["primary"] == [names] and names[1] == "transformer" and results["margin"] == 0.02
    for row in (row for row in results["rows"] if not row.get("floor")):
        for split in ("val", "test"):
            nats, tokens = read_blocks(out, row, split)
            assert nats.sum() / tokens.sum() == pytest.approx(row[f"{split}_nats_per_token"], rel=1e-5)
            documents = read_documents(out, row, split)
            assert documents.shape == nats.shape and len(set(documents.tolist())) > 1 and (np.diff(documents) >= 0).all()
    capsys.readouterr()
    for split in ("val", "test"):
        said = said_by(capsys, str(out), "--split", split)
        assert "named primary before the runs" in said and "documents" in said


def test_a_primary_comparison_names_none_of_several_variants(tmp_path):
    rates = [
        {"model": name, "seed": seed, "model_config": {"hidden_size": 8}, "train_config": {"learning_rate": rate}, "parameters": 1,
         "val_nats_per_token": 5 + 0.01 * rng.normal()}
        for rng in [np.random.default_rng(0)] for name in ("gam", "llama") for rate in (2e-3, 4e-3) for seed in range(3)
    ]  # fmt: skip
    (tmp_path / "a").mkdir()
    place = written(tmp_path / "a", {}, primary=[["gam", "llama"]], margin=0.5, extra=rates)
    found = compare([place])
    assert len(found.comparisons) == found.corrected == 6 and not any(each.primary or each.no_loss for each in found.comparisons)
    assert "named gam:llama primary and has several variants of gam" in found.paragraph()
    now = compare([place], primary=["gam (learning_rate=0.002):llama (learning_rate=0.002)"])
    assert [each.primary for each in now.comparisons].count("with this command") == 1


def test_a_primary_comparison_across_folders_was_named_in_both(tmp_path):
    first = written(tmp_path / "a", {"gam": 5.0, "llama": 5.1}, primary=[["gam", "llama"]])
    silent, named = written(tmp_path / "b", {"llama": 5.2}), written(tmp_path / "c", {"llama": 5.2}, primary=[["llama", "gam"]])
    assert compare([first]).comparisons[0].primary == "before the runs"
    assert compare([f"{first}:gam", f"{silent}:llama"]).comparisons[0].primary is None
    assert compare([f"{first}:gam", f"{named}:llama"]).comparisons[0].primary == "before the runs"


def test_one_section_says_the_same_of_a_pair_in_both_of_its_tables(tmp_path):
    place = tmp_path / "a"
    written(place, {f"gam+num_heads={n}": 5 + 0.01 * n for n in range(1, 7)}, noise=0.01)
    results = json.loads((place / "results.json").read_text())
    lowest, over = over_the_lowest(find(str(place)))
    pairs = {row[0]: row[1] for row in differences(results, place).rows}
    assert len(over) == 5
    for name, each in over.items():
        assert f"{abs(each.mean):.4f} ± {each.half_width:.4f}" in (pairs.get(f"{name} − {lowest}") or pairs[f"{lowest} − {name}"])
