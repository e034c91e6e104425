"""`gam bench-tune-state` trains what it says, and nothing else."""

from pathlib import Path

import pytest
import torch
from stacks import stack

from gam_lm import LanguageModel
from gam_lm.cli.main import run as command
from gam_lm.data.tokens import prepare
from gam_lm.experiments.state_tuning import METHODS, UNTUNED, adapted
from gam_lm.inference.start_file import initial_memory
from gam_lm.results import read_results
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "cats.txt").write_text("A cat sat on a mat. The rat ate a hat. " * 400)
    corpus = prepare(str(folder / "cats.txt"), vocab_size=280)
    fit(new_model(stack("gam", vocab_size=corpus.vocab_size), 0), corpus, TrainConfig(steps=20, batch_size=4, context=32, learning_rate=1e-2), folder / "cats")
    return folder / "cats"


def test_adapters_start_as_the_model_and_have_at_most_the_size_that_was_asked_for():
    model = LanguageModel(stack("gam", vocab_size=31)).double().eval()
    tokens = torch.randint(31, (2, 9))
    before, _ = model(tokens)
    wanted = sum(parameter.numel() for parameter in initial_memory(model).values())
    parameters = adapted(model, wanted)
    assert wanted / 2 < sum(parameter.numel() for parameter in parameters) <= wanted
    torch.testing.assert_close(model(tokens)[0], before, rtol=0, atol=0)
    with torch.no_grad():
        parameters[1].fill_(0.1)
    assert not torch.allclose(model(tokens)[0], before)


def test_the_bench_writes_a_row_for_each_and_goes_on_with_what_is_missing(run, tmp_path, capsys):
    (tmp_path / "roads.txt").write_text("We rode home by the long road, slowly. So did they. " * 400)
    flags = ["bench-tune-state", str(run), "--data", str(tmp_path / "roads.txt"), "--out", str(tmp_path / "out"), "--steps", "4", "--batch-size", "2", "--context", "32"]
    assert command([*flags, "--rates", "0.02"]) == 0
    rows = read_results(tmp_path / "out" / "results.json")["rows"]
    assert [row["variant"] for row in rows] == [UNTUNED, *METHODS]
    by = {row["variant"]: row for row in rows}
    assert all(by[method]["val_nats_per_token"] < by[UNTUNED]["val_nats_per_token"] for method in METHODS)
    assert by[METHODS[0]]["trained_parameters"] >= by[METHODS[1]]["trained_parameters"] > 0
    first = (tmp_path / "out" / "results.json").read_text()
    assert command([*flags, "--rates", "0.02"]) == 0
    assert (tmp_path / "out" / "results.json").read_text() == first
    assert command([*flags, "--rates", "0.02", "0.002"]) == 0
    assert len(read_results(tmp_path / "out" / "results.json")["rows"]) == 1 + 2 * len(METHODS)
    assert "| roads" in (tmp_path / "out" / "table.md").read_text()


def test_the_table_in_the_documentation_has_the_figures_of_the_committed_rows():
    root = Path(__file__).parent.parent
    lines = [line for line in (root / "docs" / "text.md").read_text().splitlines() if line.count("|") == 6]
    rows = read_results(root / "results" / "tune-state" / "results.json")["rows"]
    assert rows
    for row in rows:
        assert any(line.startswith(f"| {row['task']} |") and f"{row['val_bits_per_byte']:.4f}" in line for line in lines)
