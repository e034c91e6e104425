"""`gam bench --texts`: the same models on texts of other kinds, with differences that carry an interval."""

import json
from typing import get_args

import pytest
from small_runs import command, write_book

from gam_lm.cli.data import EvaluationText
from gam_lm.cli.main import run
from gam_lm.data.evaluation import EVALUATION_TEXTS, evaluation_texts
from gam_lm.errors import InputError
from gam_lm.report.compare import difference, find
from gam_lm.report.tables import text_tables
from gam_lm.results import measured_on, read_documents, read_results


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two of the texts, in the places where $GAM_DATA has them."""
    root = tmp_path / "data"
    passages = [{"context": f"the {n} old men went down to the sea and came back with", "continuation": f" {n} fish"} for n in range(40)]
    (root / "eval").mkdir(parents=True)
    (root / "eval/lambada_openai.jsonl").write_text("".join(json.dumps(each) + "\n" for each in passages))
    (root / "tinystories-sample").mkdir()
    for split in ("train", "valid", "test"):
        story = f"Once upon a time there was a {split} dog.\n<|endoftext|>\n"
        (root / f"tinystories-sample/{split}.txt").write_text(story * 30)
    monkeypatch.setenv("GAM_DATA", str(root))
    return root


def rows_of(out):
    return [row for row in json.loads((out / "results.json").read_text())["rows"] if not row.get("floor")]


def test_the_flag_names_the_texts():
    assert get_args(EvaluationText) == tuple(EVALUATION_TEXTS)
    with pytest.raises(InputError, match="lambda.*lambada"):
        list(evaluation_texts("tokenizer.json", ["lambda"]))


def test_models_are_measured_on_further_texts_as_gam_eval_does(tmp_path, texts, capsys):
    out, words = tmp_path / "out", ["--seeds", "0", "1", "--no-timing"]
    book = write_book(tmp_path)
    assert run(command("bench", book, out, *words, "--texts", "lambada")) == 0
    rows = rows_of(out)
    assert len(rows) == 4 and all(row["texts"].keys() == {"lambada"} for row in rows)
    assert "Loss on texts of other kinds" in capsys.readouterr().out and "| Model | lambada |" in (out / "table.md").read_text()

    trained = {row["model"]: (out / f"runs/{row['model']}-seed0/metrics.jsonl").stat().st_mtime_ns for row in rows}
    assert run(command("bench", book, out, *words, "--texts", "lambada", "tinystories-sample")) == 0  # what is missing is measured, and nothing trained
    more = rows_of(out)
    assert all(row["texts"].keys() == {"lambada", "tinystories-sample"} for row in more)
    assert [row["texts"]["lambada"] for row in more] == [row["texts"]["lambada"] for row in rows]
    assert trained == {row["model"]: (out / f"runs/{row['model']}-seed0/metrics.jsonl").stat().st_mtime_ns for row in rows}

    for row in more[:2]:
        for name in ("lambada", "tinystories-sample"):
            capsys.readouterr()
            assert run(["eval", str(out / f"runs/{row['model']}-seed{row['seed']}"), "--data", name, "--split", "test", "--json"]) == 0
            alone = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert row["texts"][name]["nats_per_token"] == pytest.approx(alone["test_nats_per_token"], rel=1e-6)
            assert row["texts"][name]["bits_per_byte"] == pytest.approx(alone["test_bits_per_byte"], rel=1e-6)
    assert read_documents(out, more[0], "lambada").max() > 3  # each passage is a document

    assert run(["compare", str(out), "--split", "lambada", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["comparisons"]
    losses = {(row["model"], row["seed"]): measured_on(row, "lambada")["nats_per_token"] for row in more}
    first, second = said["a"], said["b"]
    assert said["difference"] == pytest.approx(sum(losses[first, seed] - losses[second, seed] for seed in (0, 1)) / 2, abs=1e-6)
    assert run(["compare", str(out), "--split", "stdlib"]) == 2
    assert "finite loss on stdlib" in capsys.readouterr().err


def test_another_text_of_the_same_name_is_not_compared(tmp_path, texts):
    for name, tail in (("one", ""), ("other", " and more")):
        line = (texts / "eval/lambada_openai.jsonl").read_text().splitlines()[0]
        (texts / "eval/lambada_openai.jsonl").write_text((line.replace("sea", f"sea{tail}") + "\n") * 30)
        assert run(command("bench", write_book(tmp_path), tmp_path / name, "--models", "gam", "--no-timing", "--texts", "lambada")) == 0
    (a,), (b,) = (find(str(tmp_path / name)) for name in ("one", "other"))
    with pytest.raises(InputError, match="another text of the name lambada"):
        difference(a, b, "lambada")


def test_a_text_that_is_not_at_hand_is_said_before_the_training(tmp_path, texts, capsys):
    out = tmp_path / "out"
    (texts / "eval/lambada_openai.jsonl").unlink()
    assert run(command("bench", write_book(tmp_path), out, "--texts", "lambada")) == 2
    assert "data 'lambada' is not at hand" in capsys.readouterr().err and not (out / "runs").exists()


def test_rows_without_a_text_leave_its_cell_empty(tmp_path, texts):
    out = tmp_path / "out"
    assert run(command("bench", write_book(tmp_path), out, "--no-timing")) == 0
    results = read_results(out / "results.json")
    assert text_tables(results) == []
    results["rows"][0]["texts"] = {"stdlib": {"nats_per_token": 2.5, "bits_per_byte": 1.25}}
    (table,) = text_tables(results)
    assert table.columns == ["Model", "stdlib"] and table.rows == [["gam", "2.5000 (1.250)"]]
