"""`gam bench-distributed`: its rows, and the table."""

import json

import pytest

from gam_lm.cli.main import run
from gam_lm.report.distributed import distributed_table


def test_the_table_shows_every_row():
    equal = {"model": "gam", "dtype": "fp64", "variant": "2 processes", "weights_relative_difference": 3e-14, "validation_difference_nats": 0.0,
             "training_difference_nats": 1e-12, "tokens_missed": 0}  # fmt: skip
    fast = {"model": "gam", "processes": 2, "threads": 1, "tokens_per_second": 12345.6, "load_average": 0.5}
    table = distributed_table({"rows": [equal, fast]})
    assert "| gam | fp64 | 2 processes | 3.0e-14 | 0.0e+00 | 1.0e-12 | 0 |" in table
    assert "| gam | 2 | 1 | 12,346 | 0.5 |" in table


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
