"""A process of a run that dies: one line names it, the job ends within a minute, and the launcher may start it again."""

import pytest
from test_distributed import text

from gam_lm.experiments.faults import Fault, differences, job


def train(folder, steps):
    """The flags of `gam train`."""
    return ["--data", str(folder / "text"), "--vocab-size", "270", "--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--steps",
            str(steps), "--batch-size", "6", "--context", "16", "--precision", "fp32", "--device", "cpu", "--checkpoint-every", "10", "--shard"]  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_is_named_once_and_the_same_command_goes_on(tmp_path):
    text(tmp_path / "text")
    ended = job(train(tmp_path, 100_000), tmp_path / "run", Fault(name="killed"), processes=3)
    assert ended.status and ended.seconds < 60
    assert ended.said == ("gam: process 1 of 3 died; the same command goes on from the last state",)


@pytest.mark.slow
def test_the_launcher_starts_a_killed_job_again_and_the_run_is_the_same(tmp_path):
    text(tmp_path / "text")
    whole = job(train(tmp_path, 40), tmp_path / "whole")
    killed = job(train(tmp_path, 40), tmp_path / "killed", Fault(name="killed"), restarts=1)
    assert whole.status == killed.status == 0, killed.errors
    assert killed.seconds is not None and "resuming" in killed.errors
    assert differences(tmp_path / "whole", tmp_path / "killed") == {"weights_difference": 0.0, "losses_difference_nats": 0.0}


@pytest.mark.slow
def test_a_job_killed_while_it_writes_a_state_goes_on_from_the_one_before(tmp_path):
    text(tmp_path / "text")
    killed = job(train(tmp_path, 40), tmp_path / "run", Fault(name="killed", moment="writing"))
    assert killed.status and killed.seconds is not None
    states = [path.name for path in (tmp_path / "run" / "state").glob("step-*")]
    assert len(states) == 1
    whole, again = (job(train(tmp_path, 40), tmp_path / name) for name in ("whole", "run"))
    assert whole.status == again.status == 0 and "resuming" in again.errors
    assert differences(tmp_path / "whole", tmp_path / "run") == {"weights_difference": 0.0, "losses_difference_nats": 0.0}
