"""`gam bench-distributed`: its rows, and the table."""

import json
from functools import partial

import pytest
import torch
from stacks import stack

from gam_lm.checkpoint import save_model
from gam_lm.cli.main import run
from gam_lm.experiments import distributed
from gam_lm.experiments.faults import FAULTS, Ended, differences, outcome
from gam_lm.report.distributed import distributed_table
from gam_lm.training.new import new_model


def test_the_table_shows_every_row():
    equal = {"model": "gam", "dtype": "fp64", "variant": "2 processes", "weights_relative_difference": 3e-14, "validation_difference_nats": 0.0,
             "training_difference_nats": 1e-12, "tokens_missed": 0}  # fmt: skip
    fast = {"model": "gam", "processes": 2, "threads": 1, "tokens_per_second": 12345.6, "load_average": 0.5}
    table = distributed_table({"rows": [equal, fast]})
    assert "| gam | fp64 | 2 processes | 3.0e-14 | 0.0e+00 | 1.0e-12 | 0 |" in table
    assert "| gam | 2 | 1 | 12,346 | 0.5 |" in table


@pytest.mark.parametrize(("rank", "line", "named"), [
    (0, "gam: process 0 of 2 died; the same command goes on from the last state", True),
    (1, "gam: process 0 of 2 died; the same command goes on from the last state", False),
    (1, "interrupted after step 12 of 100; the same command goes on from there", False),
])  # fmt: skip
def test_a_row_of_a_fault_says_whether_the_process_that_died_is_named_and_the_table_shows_it(rank, line, named):
    fault = next(each for each in FAULTS if each.rank == rank)
    found = outcome(Ended(1, (line,), line, 7.25), fault)
    assert (found["names_process"], found["messages"], found["seconds_to_end"], found["exit_status"]) == (named, [line], 7.25, 1)
    row = {"model": "gam", "dtype": "fp32", "variant": f"fault: {fault.name}", "weights_difference": 0.0, "losses_difference_nats": 0.5} | found
    saves = {"model": "gam", "variant": "a state every 10 steps", "step_ms_with_states": 11.0, "step_ms_without_states": 10.0, "saving_ratio": 1.1,
             "saving_ratio_least": 1.0, "saving_ratio_largest": 1.25}  # fmt: skip
    table = distributed_table({"rows": [row, saves]})
    assert f"| gam | {fault.name} | 7.2 | 1 | {'yes' if named else 'no'} | 0.0e+00 | 5.0e-01 |" in table
    assert "| gam | a state every 10 steps | 11.0 | 10.0 | 1.10 | 1.00 to 1.25 |" in table


def test_differences_of_two_runs_are_the_largest_ones_and_other_steps_are_refused(tmp_path):
    model = new_model(stack("gam", vocab_size=40), 0)
    for name, change, nats in (("whole", 0.0, 2.0), ("run", 0.25, 2.5)):
        with torch.no_grad():
            next(iter(model.parameters())).view(-1)[3] += change
        save_model(tmp_path / name, model, None)
        lines = [{"step": 10, "train_nats": 3.0}, {"step": 20, "train_nats": 2.0, "val_nats": nats}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences(tmp_path / "whole", tmp_path / "run")
    assert found["weights_difference"] == pytest.approx(0.25, rel=1e-6) and found["losses_difference_nats"] == 0.5
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 10, "train_nats": 3.0}) + "\n")
    with pytest.raises(ValueError, match="steps"):
        differences(tmp_path / "whole", tmp_path / "run")


def test_numbers_that_make_no_measurement_are_refused_in_one_line(tmp_path, capsys):
    assert run(["bench-distributed", "--processes", "0", "--out", str(tmp_path / "out")]) == 2
    assert "processes is 0" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_move(tmp_path):
    out = tmp_path / "out"
    assert run(["bench-distributed", "--models", "gam", "--processes", "2", "--steps", "30", "--speed-steps", "1", "--only", "equality", "speed", "--out", str(out)]) == 0
    rows = {(row["dtype"], row["variant"]): row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert list(rows) == [("fp64", "2 processes"), ("fp32", "2 processes"), ("fp64", "Muon, 2 processes"), ("fp64", "stopped and gone on, 2→1→2 processes"),
                          ("fp32", "speed, 1 processes"), ("fp32", "speed, 2 processes")]  # fmt: skip
    for (dtype, variant), row in rows.items():
        if "speed" in variant:
            assert row["tokens_per_second"] > 0
            continue
        assert row["tokens_missed"] == 0 and row["steps"] == 30
        assert row["weights_relative_difference"] < (1e-9 if dtype == "fp64" else 2e-3)
        assert max(row["training_difference_nats"], row["validation_difference_nats"]) < (1e-6 if dtype == "fp64" else 5e-3)
    assert (out / "table.md").is_file()


@pytest.mark.slow
def test_states_that_are_written_beside_the_training_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_saves", partial(distributed._saves, rounds=1))
    out = tmp_path / "out"
    assert run(["bench-distributed", "--models", "gam", "--only", "saves", "--out", str(out)]) == 0
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert 0 < row["saving_ratio_least"] <= row["saving_ratio"] <= row["saving_ratio_largest"]
    assert row["step_ms_with_states"] > 0 and row["train_config"]["checkpoint_every"] == 10
