"""Training on several processes against training on one: the same losses, weights, validation and files."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import in_processes, launched
from stacks import stack

import gam_lm.training.loop as loop
from gam_lm.checkpoint import load_model
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.runtime.progress import progress
from gam_lm.training.distributed import DataParallel, World, own_randomness
from gam_lm.training.evaluate import evaluate
from gam_lm.training.loop import fit, make_optimizer, new_model, train_step
from gam_lm.training.recipe import TrainConfig

RECIPE = TrainConfig(steps=10, batch_size=6, context=16, learning_rate=3e-3, warmup_steps=2, precision="fp32", validate_every=5, accumulate=3, ema=0.5)


def text(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 3000), ("valid", 300)):
        (folder / f"{split}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], count)) + "\n")
    return folder


def tokens(folder):
    return prepare(str(folder), vocab_size=270)


@pytest.fixture
def texts(tmp_path):
    found = text(tmp_path / "text")
    tokens(found)  # for all processes
    return found


def model_of(dtype=torch.float64):
    return new_model(stack("gam", vocab_size=270), 0).to(dtype)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(rank, texts, folder, recipe):
    model = model_of()
    trained = fit(model, tokens(texts), recipe, folder)
    np.savez(folder.with_suffix(f".{rank}.npz"), weights=weights(model), blocks=trained.validation.block_nats, tokens=trained.tokens)


def read(folder, rank):
    return np.load(folder.with_suffix(f".{rank}.npz"))


def same_run(found, expected):
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["blocks"], expected["blocks"], rtol=1e-9)
    assert found["tokens"] == expected["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_make_the_run_of_one(texts, tmp_path, optimizer):
    recipe = RECIPE.replace(optimizer=optimizer)
    train(0, texts, tmp_path / "one", recipe)
    in_processes(2, train, tmp_path, texts, tmp_path / "two", recipe)
    expected = read(tmp_path / "one", 0)
    for rank in (0, 1):
        same_run(read(tmp_path / "two", rank), expected)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two] == [5, 10]
    for figure in ("train_nats", "val_nats", "gradient_norm"):
        assert [line[figure] for line in two] == pytest.approx([line[figure] for line in one], rel=1e-7)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names and ".owner.json" not in names
    torch.testing.assert_close(weights(load_model(tmp_path / "two")), weights(load_model(tmp_path / "one")))


class Stopped(Exception):
    pass


def stop_after(rank, texts, folder, recipe, steps, count=1):
    """Train ``steps`` steps; SIGTERM reaches the last process alone."""
    original, done = loop.train_step, []

    def step(*arguments):
        done.append(1)
        if len(done) == steps and rank == count - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    loop.train_step = step
    try:
        fit(model_of(), tokens(texts), recipe, folder)
    except KeyboardInterrupt:
        assert len(done) == steps
    else:
        raise AssertionError("it was not stopped")
    finally:
        loop.train_step = original


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(texts, tmp_path):
    train(0, texts, tmp_path / "whole", RECIPE)
    run = tmp_path / "moved"
    in_processes(2, stop_after, tmp_path, texts, run, RECIPE, 3, 2)
    stop_after(0, texts, run, RECIPE, 4)
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    in_processes(2, train, tmp_path, texts, run, RECIPE)
    same_run(read(run, 0), read(tmp_path / "whole", 0))
    assert [line["tokens"] for line in lines(run)] == [line["tokens"] for line in lines(tmp_path / "whole")]


def parts_of_a_world(rank, texts):
    world = World.current()
    assert world == World(rank, 2) and world.gather(rank) == [0, 1] and world.any(rank == 1) and not world.any(False)
    assert world.first(lambda: 3) == (3 if rank == 0 else None)

    def refuse():
        raise InputError("out is taken: choose another")

    with pytest.raises(InputError, match="out is taken"):
        world.first(refuse)

    model, corpus = model_of(), tokens(texts)
    whole, shared = (evaluate(model, corpus.splits["valid"], context=16, batch_size=4, world=each) for each in (None, world))
    np.testing.assert_array_equal(shared.block_nats, whole.block_nats)
    np.testing.assert_array_equal(shared.batch_means, whole.batch_means)
    np.testing.assert_allclose(shared.position_nats, whole.position_nats, rtol=1e-12)
    assert shared.block_tokens.sum() == corpus.splits["valid"].tokens - 1

    # Every process takes rows of its own; the gradients are summed once a batch, whatever its parts.
    parallel = DataParallel(model, world)
    sums = []
    parallel.module.register_comm_hook(None, lambda state, bucket: sums.append(1) or _summed(bucket))
    rows = torch.arange(7)
    assert torch.equal(torch.cat(world.gather(torch.cat(list(parallel.parts(rows, 4))))), rows)
    assert [len(part) for part in parallel.parts(rows, 4)] == ([2, 2] if rank == 0 else [2, 1])
    recipe = RECIPE.replace(accumulate=1)
    optimizer = make_optimizer(model, recipe)
    batch = np.random.default_rng(0).integers(0, 270, (2, 6, 16))
    counts = []
    for accumulate in (1, 3, 6):
        sums.clear()
        train_step(model, optimizer, (batch[0], batch[1]), recipe.replace(accumulate=accumulate), 1e-3, torch.float32, parallel)
        counts.append(len(sums))
    assert counts[0] == counts[1] == counts[2] > 0

    # Dropout draws other numbers on each process, the same ones when the step is made again.
    torch.manual_seed(0)
    own_randomness(0, 5, world)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    own_randomness(0, 5, world)
    assert torch.equal(drawn, torch.rand(3))
    first, second = world.gather(drawn)
    assert not torch.equal(first, second)

    with pytest.raises(InputError, match="batch_size is 1 for 2 processes"):
        fit(model, corpus, RECIPE.replace(batch_size=1, accumulate=1), Path("nowhere"))


def _summed(bucket):
    work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@pytest.mark.slow
def test_what_the_processes_of_a_run_share(texts, tmp_path):
    in_processes(2, parts_of_a_world, tmp_path, texts)


def test_only_the_first_process_shows_progress(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("RANK", "1")
    with progress("work", 3) as bar:
        assert type(bar).__name__ == "Progress"


def test_work_done_before_counts_to_the_total_and_not_to_the_rate(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("gam_lm.runtime.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level("INFO", logger="gam_lm"), progress("work", 1000, done=900) as bar:
        now[0] = 40.0
        bar.advance(20)
    assert "work: 920/1000 steps, 0.5/s, 160 s left" in caplog.text


def command(count, folder, text_folder, *more):
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "gam_lm"]
    flags = ["train", "--data", str(text_folder), "--vocab-size", "270", "--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2"]
    recipe = ["--steps", "8", "--batch-size", "4", "--context", "16", "--precision", "fp32", "--device", "cpu", "--out", str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    return launched([*started, *flags, *recipe], env=environment)


@pytest.mark.slow
def test_the_command_is_the_same_under_torchrun(tmp_path):
    text(tmp_path / "text")
    one, two = (command(count, tmp_path / f"run{count}", tmp_path / "text") for count in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr
    assert two.stdout.count("\ntraining ") == one.stdout.count("\ntraining ") == 1  # one plan, told by one process
    for line, expected in zip(lines(tmp_path / "run2"), lines(tmp_path / "run1"), strict=True):
        assert line["step"] == expected["step"] and line["val_nats"] == pytest.approx(expected["val_nats"], abs=1e-4)
        assert line["train_nats"] == pytest.approx(expected["train_nats"], abs=1e-4)
    refused = command(2, tmp_path / "run2", tmp_path / "text", "--learning-rate", "0.5")
    assert refused.returncode and "holds another run" in refused.stderr
