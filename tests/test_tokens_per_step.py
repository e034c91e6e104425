"""`--tokens-per-step`: the batch, its parts and the line that tells them follow from one number, the processes and the memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_command import SMALL, make_folder, refused
from stacks import stack

import gam_lm.runtime.isolation as isolation
import gam_lm.training.planning as planning
from gam_lm.checkpoint import read_json
from gam_lm.cli.main import run
from gam_lm.diagnostics.cost import BYTES_PER_PARAMETER, model_cost
from gam_lm.training.planning import parts_that_fit
from gam_lm.training.recipe import TrainConfig

ALONE = [flag for flag, before in zip(SMALL, ["", *SMALL], strict=False) if "--batch-size" not in (flag, before)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return make_folder(tmp_path, monkeypatch)


def room_for(rows, context=16, **changes):
    """MB of free memory in which so many sequences of the small model fit."""
    cost = model_cost(stack("gam", **changes), context)
    return (BYTES_PER_PARAMETER * cost.total_parameters + (rows + 0.5) * cost.activation_bytes * context) / planning.SHARE_OF_MEMORY / 2**20


def test_batch_and_accumulation_follow_and_are_printed(folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "available_mb", lambda: 1e6)
    arguments = ["train", "my_text.txt", *ALONE, "--steps", "3", "--tokens-per-step", "200"]
    assert run(arguments) == 0
    assert "\nbatch       192 tokens a step (200 asked for): 12 sequences of 16, 12 at a time, accumulation 1\n" in capsys.readouterr().out
    assert run(arguments) == 0  # goes on, here: is finished
    assert "holds another run (tokens_per_step 192, not 64)" in refused(capsys, [*arguments[:-1], "64"])
    assert "use one of them" in refused(capsys, [*arguments, "--batch-size", "12"])
    assert "tokens_per_step is 15 for sequences of 16 tokens" in refused(capsys, [*arguments[:-1], "15", "--out", "other"])
    monkeypatch.setattr(planning, "available_mb", lambda: 1e-3)  # not even the weights fit: one sequence at a time
    assert run([*arguments, "--out", "small"]) == 0
    recipes = [read_json(folder / path / "recipe.json")["train_config"] for path in ("runs/my_text", "small")]
    assert [(each["batch_size"], each["accumulate"]) for each in recipes] == [(12, 1), (12, 12)]


@given(batch=st.integers(1, 64), processes=st.integers(1, 8), rows=st.integers(1, 64))
def test_parts_are_the_fewest_that_fit(batch, processes, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "available_mb", lambda: processes * room_for(rows))
        patch.setenv("WORLD_SIZE", str(processes))
        own = -(-batch // processes)

        def fits(parts):
            return -(-own // -(-parts // processes)) <= rows

        found = parts_that_fit(stack("gam"), TrainConfig(batch_size=batch, context=16), torch.device("cpu"))
        assert batch % found == 0 and (fits(found) or found == batch)
        assert not any(fits(parts) for parts in range(1, found) if batch % parts == 0)


def test_pages_of_files_count_as_memory_that_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "CONTROL_GROUP", tmp_path)
    for name, content in (("max", f"{300 * 2**20}\n"), ("current", f"{250 * 2**20}\n"), ("stat", f"anon 7\ninactive_file {180 * 2**20}\nactive_file 9\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert isolation.available_mb() == 230
