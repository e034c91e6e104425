"""A run that was stopped anywhere goes on as the run that nobody stopped, and has one owner."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import gam_lm.training.loop as loop
import gam_lm.training.saving as saving
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.runtime.ownership import owned
from gam_lm.training.interruption import Abandoned, signals_held
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig

RECIPE = TrainConfig(steps=14, batch_size=4, context=16, warmup_steps=2, precision="fp32", validate_every=7, checkpoint_every=5, ema=0.5)
DRIVER = Path(__file__).parent / "soak" / "kills.py"


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for split, count in (("train", 3000), ("valid", 300)):
        (tmp_path / "text" / f"{split}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], count)) + "\n")
    return prepare(str(tmp_path / "text"), vocab_size=270)


def small_model(seed=0):
    return new_model(ModelConfig(vocab_size=270, hidden_size=16, num_hidden_layers=2, dropout=0.1), seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def records(run):
    if not (run / "metrics.jsonl").exists():
        return []
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def states(run):
    return [path.name for path in (run / "state").iterdir()]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
@pytest.mark.parametrize("arguments", [["--operations"], ["--random", "10", "--seed", "3"]], ids=["every file operation", "random moments"])
def test_killed_runs_leave_the_bytes_of_a_run_that_nobody_killed(arguments):
    done = subprocess.run([sys.executable, DRIVER, *arguments], capture_output=True, text=True, timeout=1200, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("differences_without_kills") == []
    (part,) = (value for value in report.values() if isinstance(value, dict))
    assert part["failures"] == [] and part["kills"] >= (100 if arguments == ["--operations"] else 8)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["train_step", "evaluate", "save_model", "save_state"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_anywhere_ends_the_run_between_two_steps_and_it_goes_on_bit_by_bit(corpus, tmp_path, monkeypatch, number, where, call):
    whole = small_model()
    fit(whole, corpus, RECIPE, tmp_path / "whole")
    place = saving if where.startswith("save") else loop
    original, count = getattr(place, where), []

    def interrupted(*arguments, **options):
        count.append(1)
        if len(count) == call:
            signal.raise_signal(number)
        return original(*arguments, **options)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(place, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(small_model(), corpus, RECIPE, tmp_path / "run")
    assert signal.getsignal(number) is before
    if where == "evaluate":  # the validation is given up at once, and made when the run goes on
        assert states(tmp_path / "run") == [f"step-{7 * call:08d}-unrecorded"] and len(records(tmp_path / "run")) == 2 * (call - 1)
    again = small_model(seed=5)
    fit(again, corpus, RECIPE, tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert states(tmp_path / "run") == states(tmp_path / "whole")


def test_a_second_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt, match="^$"), signals_held() as interruption:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Abandoned):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # no more than asking again


def test_a_request_that_nobody_answered_is_not_lost():
    with pytest.raises(KeyboardInterrupt), signals_held():
        signal.raise_signal(signal.SIGTERM)


def test_a_run_in_another_thread_trains_and_leaves_the_signals_alone(corpus, tmp_path):
    before, done = signal.getsignal(signal.SIGINT), []

    def train():
        done.append(fit(small_model(), corpus, RECIPE.replace(steps=2), tmp_path / "run"))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done[0].steps == 2 and signal.getsignal(signal.SIGINT) is before


def test_a_state_is_written_by_the_clock(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(loop, "SHARE_OF_SAVING", 1e9)
    saved, original = [], saving.save_state
    monkeypatch.setattr(saving, "save_state", lambda directory, progress, *rest: (saved.append(progress.step), original(directory, progress, *rest)))
    fit(small_model(), corpus, RECIPE.replace(steps=4, checkpoint_every=1000, validate_every=None), tmp_path / "run")
    assert saved == [0, 1, 2, 3, 4]


def test_how_often_is_saved_and_validated_may_change_when_a_run_goes_on(corpus, tmp_path, monkeypatch):
    whole = small_model()
    fit(whole, corpus, RECIPE, tmp_path / "whole")
    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *arguments: (_ for _ in ()).throw(RuntimeError("killed")) if stop() else original(*arguments))
    count = []

    def stop():
        count.append(1)
        return len(count) == 9

    with pytest.raises(RuntimeError, match="killed"):
        fit(small_model(), corpus, RECIPE, tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", original)
    again = small_model()
    changed = RECIPE.replace(checkpoint_every=2, validate_every=4)
    trained = fit(again, corpus, changed, tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    assert [point["step"] for point in trained.curve] == [7, 8, 12, 14]
    assert TrainConfig.from_dict(json.loads((tmp_path / "run" / "recipe.json").read_text())["train_config"]) == changed
    with pytest.raises(InputError, match="holds another run"):
        fit(small_model(), corpus, RECIPE.replace(weight_decay=0.2), tmp_path / "run")


# One owner


def test_a_second_process_is_told_who_holds_the_run(corpus, tmp_path):
    run = tmp_path / "run"
    with owned(run), pytest.raises(InputError, match=rf"out is '{run}', which process {os.getpid()} on .* \(since 20.*\) is writing: wait") as caught:
        fit(small_model(), corpus, RECIPE, run)
    assert "\n" not in str(caught.value)
    fit(small_model(), corpus, RECIPE.replace(steps=1), run)  # free again, and nothing foreign in it
    assert not (run / ".owner.json").exists()


def test_a_run_is_held_to_its_end_also_with_a_tracker(corpus, tmp_path):
    seen = []

    class Tracker:
        def start(self, step):
            seen.append(("start", step))

        def log(self, figures, step):
            with pytest.raises(InputError, match="is writing"), owned(tmp_path / "run"):
                pass
            seen.append(("log", step))

        def finish(self):
            seen.append(("finish",))

    fit(small_model(), corpus, RECIPE.replace(steps=10), tmp_path / "run", tracker=Tracker())
    assert seen == [("start", 0), ("log", 7), ("log", 10), ("finish",)]


def test_tensorboard_makes_its_folder_after_the_run_was_claimed(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    from gam_lm.training.trackers import make_tracker

    run = tmp_path / "run"
    for _ in range(2):  # and again when the run goes on
        fit(small_model(), corpus, RECIPE, run, tracker=make_tracker("tensorboard", run, {}))
    assert list((run / "tensorboard").glob("events*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        fit(small_model(), corpus, RECIPE, tmp_path / "mine", tracker=make_tracker("tensorboard", tmp_path / "mine", {}))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_hold_of_a_killed_process_ends_with_it(tmp_path):
    code = (
        "import os, sys, pathlib\nfrom gam_lm.runtime.ownership import owned\n"
        "with owned(pathlib.Path(sys.argv[1])):\n print('held', flush=True)\n sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {process.pid} on"), owned(tmp_path / "run"):
            pass
        process.kill()
    with owned(tmp_path / "run"):
        pass


def test_what_killed_runs_left_is_removed_and_nothing_else(corpus, tmp_path):
    run = tmp_path / "run"
    fit(small_model(), corpus, RECIPE.replace(steps=1), run)
    expected = sorted(path.name for path in run.rglob("*"))
    (run / ".recipe.json.0123456789abcdef.gam-part").write_text("{")
    (run / "state" / ".step-00000001.0123456789abcdef.gam-part").mkdir()
    (run / "state" / ".step-00000001.0123456789abcdef.gam-part" / "model.safetensors").write_text("half")
    (run / ".mine.gam-part").write_text("not theirs")
    fit(small_model(), corpus, RECIPE.replace(steps=1), run)
    assert sorted(path.name for path in run.rglob("*")) == sorted([*expected, ".mine.gam-part"])


def test_a_folder_in_which_a_run_was_killed_while_it_wrote_its_recipe_is_free(corpus, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".recipe.json.0123456789abcdef.gam-part").write_text('{"model_')
    (run / ".lock").touch()
    fit(small_model(), corpus, RECIPE.replace(steps=1), run)
    assert (run / "recipe.json").is_file()
