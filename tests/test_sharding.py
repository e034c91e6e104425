"""Weights, gradients and optimiser state spread over processes: the run is that of one process, and goes on with any number of them, sharded or not."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from stacks import stack
from test_distributed import RECIPE, lines, model_of, read, text, tokens, train, weights

import gam_lm.training.loop as loop
from gam_lm.checkpoint import load_model
from gam_lm.errors import InputError
from gam_lm.training.loop import fit, make_optimizer, new_model
from gam_lm.training.muon import Muon
from gam_lm.training.sharding import full, gathered, local, shard
from gam_lm.training.spread import matrices_of, shares

LONG = RECIPE.replace(steps=50, batch_size=12, validate_every=25, keep="best", checkpoint_every=7)


@pytest.fixture
def texts(tmp_path):
    found = text(tmp_path / "text")
    tokens(found)  # for all processes
    return found


def sharded(rank, texts, folder, recipe, stop=None):
    """Train sharded, up to about ``stop`` steps; the blocks of the last validation and the whole weights go beside the run."""
    original, done = loop.train_step, []

    def step(*arguments):
        done.append(1)
        if stop is not None and len(done) == stop:
            loop_run[0].interruption.requested = rank == 0
        return original(*arguments)

    loop_run, begin = [], loop._Run.train

    def remembered(self):
        loop_run.append(self)
        return begin(self)

    loop.train_step, loop._Run.train = step, remembered
    model = model_of()
    try:
        trained = fit(model, tokens(texts), recipe, folder, shard=dist.get_world_size() > 1)
    except KeyboardInterrupt:
        assert stop is not None
        return
    finally:
        loop.train_step, loop._Run.train = original, begin
    assert stop is None
    whole = torch.cat([full(p).detach().flatten() for p in model.parameters()])
    assert all(local(p).numel() <= -(-len(p) // dist.get_world_size()) * p[0].numel() for p in model.parameters())
    np.savez(folder.with_suffix(f".{rank}.npz"), weights=whole, blocks=trained.validation.block_nats, tokens=trained.tokens)


def same_to_rounding(found, expected):
    """50 steps of AdamW grow rounding in single small weights beyond 1e-9 of themselves."""
    assert np.linalg.norm(found["weights"] - expected["weights"]) < 1e-9 * np.linalg.norm(expected["weights"])
    np.testing.assert_allclose(found["blocks"], expected["blocks"], rtol=1e-9)
    assert found["tokens"] == expected["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_processes_make_the_run_of_one(texts, tmp_path, optimizer):
    recipe = LONG.replace(optimizer=optimizer)
    train(0, texts, tmp_path / "one", recipe)
    in_processes(4, sharded, tmp_path, texts, tmp_path / "four", recipe)
    expected = read(tmp_path / "one", 0)
    for rank in range(4):
        same_to_rounding(read(tmp_path / "four", rank), expected)
    for line, other in zip(lines(tmp_path / "four"), lines(tmp_path / "one"), strict=True):
        assert line["train_nats"] == pytest.approx(other["train_nats"], rel=1e-9) and line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-7)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "four").iterdir()) == names
    four, one = (weights(load_model(tmp_path / run)) for run in ("four", "one"))
    assert (four - one).norm() < 1e-9 * one.norm()
    [state] = (tmp_path / "four" / "state").glob("step-*")
    assert sorted(path.suffix for path in state.rglob("*") if path.is_file()) == [".json", *[".safetensors"] * 5]  # no pickle, one file a process


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_other_numbers_of_processes(texts, tmp_path):
    recipe = LONG.replace(optimizer="muon", keep="last")
    train(0, texts, tmp_path / "whole", recipe)
    run = tmp_path / "moved"
    for count, stop in ((4, 11), (2, 9)):
        in_processes(count, sharded, tmp_path, texts, run, recipe, stop)
        (tmp_path / "rendezvous").unlink(missing_ok=True)
    in_processes(1, sharded, tmp_path, texts, run, recipe, 13)  # of one process, whole
    assert json.loads(next((run / "state").glob("step-*/progress.json")).read_text())["step"] == 33
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    in_processes(4, sharded, tmp_path, texts, run, recipe)
    same_to_rounding(read(run, 0), read(tmp_path / "whole", 0))
    assert [line["tokens"] for line in lines(run)] == [line["tokens"] for line in lines(tmp_path / "whole")]


def in_fp32(rank, texts, folder):
    fit(model_of().float(), tokens(texts), RECIPE, folder, shard=dist.get_world_size() > 1)


@pytest.mark.slow
def test_sharded_processes_in_fp32_have_the_losses_of_one(texts, tmp_path):
    for count in (1, 2):
        in_processes(count, in_fp32, tmp_path, texts, tmp_path / str(count))
        (tmp_path / "rendezvous").unlink(missing_ok=True)
    one, two = ([line["train_nats"] for line in lines(tmp_path / count)] for count in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-4)


def spread(rank):
    """Muon over several processes against Muon on one: whole weights, and weights sharded by rows."""
    torch.manual_seed(0)
    shapes, rows = [(9, 4), (4, 4), (6, 20), (1, 5), (12, 3)], [(9,), (2, 2), (6,), (1,), (3, 4, 5)]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(3)]

    def moved(processes, parameters, put):
        optimizer = Muon(zip(parameters, rows, strict=True), lr=0.1, weight_decay=0.1, processes=processes)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = put(gradient)
            optimizer.step()
        return [full(parameter.detach()) for parameter in parameters]

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def by_rows(tensor):
        return distribute_tensor(tensor.clone(), mesh, [Shard(0)])

    expected = moved(1, [torch.nn.Parameter(each.clone()) for each in start], lambda tensor: tensor.clone())
    for found in (
        moved(dist.get_world_size(), [torch.nn.Parameter(each.clone()) for each in start], lambda tensor: tensor.clone()),
        moved(dist.get_world_size(), [torch.nn.Parameter(by_rows(each)) for each in start], by_rows),
    ):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-13)

    # A sharded model keeps what marks its parameters, has rank 0's weights, and is whole again on rank 0 alone.
    torch.manual_seed(rank)
    model = new_model(stack("mamba"), rank)
    marked = {name for name, parameter in model.named_parameters() if getattr(parameter, "no_weight_decay", False)}
    shard(model, torch.device("cpu"))
    assert marked == {name for name, parameter in model.named_parameters() if getattr(parameter, "no_weight_decay", False)} != set()
    kept = sum(group["weight_decay"] == 0 for group in make_optimizer(model, RECIPE.replace(optimizer="adamw")).param_groups)
    assert kept == 1
    copy = gathered(model)
    assert (copy is None) == bool(rank)
    if copy is not None:
        torch.testing.assert_close(weights(copy), weights(new_model(stack("mamba"), 0)), rtol=0, atol=0)
        assert copy.lm_head.weight is copy.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_muon_over_several_processes_moves_weights_as_on_one(tmp_path, count):
    in_processes(count, spread, tmp_path)


def test_every_matrix_has_one_owner_and_the_work_is_shared_out():
    matrices = matrices_of([(64, 64)] * 7 + [(8, 128), (4, 4)], [(64,)] * 7 + [(4, 4), (4,)])
    owned = shares(matrices, 4)
    assert sorted(sum(owned, [])) == sorted(matrices)  # noqa: RUF017
    work = [sum(m.operations for m in own) for own in owned]
    assert max(work) - min(work) <= 64**3
    assert [matrices[0].part(rank, 3) for rank in range(3)] == [(0, 22), (22, 44), (44, 64)]
    assert [matrices[-1].part(rank, 3) for rank in range(3)] == [(0, 2), (2, 4), (4, 4)]


def refused(rank, texts, folder):
    with pytest.raises(InputError, match="batch_size is 7 for 2 processes with shard: use a multiple of 2"):
        fit(model_of(), tokens(texts), RECIPE.replace(batch_size=7, accumulate=1), folder, shard=True)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused_in_one_line(texts, tmp_path):
    with pytest.raises(InputError, match="shard is True for one process"):
        fit(model_of(), tokens(texts), RECIPE, tmp_path / "run", shard=True)
    in_processes(2, refused, tmp_path, texts, tmp_path / "run")
