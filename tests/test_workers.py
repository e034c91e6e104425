"""`--workers N`: processes that share the rows of a comparison or the trials of a study."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import command, write_book

import gam_lm
from gam_lm.cli.main import run
from gam_lm.runtime.workers import CORES, _environment, claimed

SOURCE = str(Path(gam_lm.__file__).parents[1])


def in_a_process(arguments):
    environment = {key: value for key, value in os.environ.items() if key != "GAM_LM_WORKER"} | {"PYTHONPATH": SOURCE}
    return subprocess.run([sys.executable, "-m", "gam_lm", *arguments], env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture
def book(tmp_path):
    return write_book(tmp_path)


def figures(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    return sorted((row["model"], row["seed"], row.get("trial"), row["val_nats_per_token"]) for row in rows if "train_config" in row)


def test_a_claim_is_one_process_alone_and_ends_with_it(tmp_path):
    claiming = f"from gam_lm.runtime.workers import claimed\nfrom pathlib import Path\nwith claimed(Path({str(tmp_path)!r}), 'row') as ours:\n print(ours)"

    def elsewhere():
        found = subprocess.run([sys.executable, "-c", claiming], env=os.environ | {"PYTHONPATH": SOURCE}, capture_output=True, text=True)
        return found.stdout.strip()

    with claimed(tmp_path, "row") as ours, claimed(tmp_path, "another row") as other:
        assert ours and other and elsewhere() == "False"
    assert elsewhere() == "True"


def test_workers_share_cores_and_gpus(monkeypatch):
    shared = [_environment(number, 2, []) for number in (1, 2)]
    assert [each["GAM_LM_WORKER"] for each in shared] == ["1", "2"]
    assert all(each["OMP_NUM_THREADS"] == str(max(1, CORES // 2)) for each in shared)
    assert [_environment(number, 3, ["4", "7"])["CUDA_VISIBLE_DEVICES"] for number in (1, 2, 3)] == ["4", "7", "4"]


@pytest.mark.parametrize("verb", ["bench", "tune"])
def test_a_number_of_workers_below_one_is_refused_in_one_line(book, tmp_path, verb, capsys):
    assert run(command(verb, book, tmp_path / "out", "--workers", "0")) == 2
    assert "workers is 0" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_comparison_of_two_workers_is_that_of_one(book, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command("bench", book, one, "--seeds", "0", "1", "--no-timing")) == 0
    found = in_a_process(command("bench", book, two, "--seeds", "0", "1", "--no-timing", "--workers", "2"))
    assert found.returncode == 0, found.stderr
    assert [row[:3] for row in figures(two)] == [row[:3] for row in figures(one)] and len(figures(one)) == 4
    assert [row[3] for row in figures(two)] == pytest.approx([row[3] for row in figures(one)], abs=1e-5)
    logs = [(two / "workers" / f"{number}.log").read_text() for number in (1, 2)]
    for model in ("gam-seed0", "gam-seed1", "transformer-seed0", "transformer-seed1"):  # each row was trained by one of them
        assert sum(f"{model}: step 3/3" in log for log in logs) == 1
        assert f"{model}: already in" in found.stderr
    assert "ended with exit code" not in found.stderr and (two / "table.md").is_file()


@pytest.mark.slow
def test_a_study_of_two_workers_is_that_of_one(book, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command("tune", book, one, "--trials", "2", "--widenings", "0")) == 0
    found = in_a_process(command("tune", book, two, "--trials", "2", "--widenings", "0", "--workers", "2"))
    assert found.returncode == 0, found.stderr
    assert "ended with exit code" not in found.stderr
    assert [row[:3] for row in figures(two)] == [row[:3] for row in figures(one)] and len(figures(one)) == 4
    assert [row[3] for row in figures(two)] == pytest.approx([row[3] for row in figures(one)], abs=1e-5)
