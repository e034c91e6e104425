"""Run directories that others damaged, and places that cannot be written: one line that names the file."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gam_lm.checkpoint import load_model, save_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.runtime.files import replacing, write_text
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.state import Progress

RECIPE = TrainConfig(steps=4, batch_size=4, context=16, precision="fp32", ema=0.5)


def small_model():
    return new_model(ModelConfig(vocab_size=270, hidden_size=16, num_hidden_layers=2), 0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus and a finished run that still has its state."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for split, count in (("train", 1000), ("valid", 100)):
        (folder / "text" / f"{split}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], count)) + "\n")
    corpus = prepare(str(folder / "text"), vocab_size=270, cache=folder / "cache")
    fit(small_model(), corpus, RECIPE, folder / "run")
    return corpus, folder / "run"


@pytest.fixture
def corpus(made):
    return made[0]


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "run")


def one_line(caught, *names):
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in names), message


STATE = "state/step-00000004/"
DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no utf-8": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[1, 2]\n",
    "null": lambda content: b"null\n",
    "deep": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["recipe.json", STATE + "progress.json", STATE + "model.safetensors", STATE + "optimizer.safetensors",
                                  STATE + "average.safetensors", STATE + "generators.safetensors", "metrics.jsonl"])  # fmt: skip
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_run_is_named_when_it_is_to_go_on(run, corpus, name, damage):
    content = (run / name).read_bytes()
    (run / name).write_bytes(DAMAGES[damage](content))
    if name == "metrics.jsonl" and damage in ("empty", "truncated", "deep"):
        fit(small_model(), corpus, RECIPE, run)  # a last line without its end is what a kill leaves: it is dropped
        return
    with pytest.raises(InputError) as caught:
        fit(small_model(), corpus, RECIPE, run)
    one_line(caught, name.rsplit("/")[-1] if damage != "missing" else name)


@pytest.mark.parametrize("name", ["progress.json", "model.safetensors", "optimizer.safetensors", "average.safetensors", "generators.safetensors"])
def test_a_missing_file_of_a_state_is_named(run, corpus, name):
    (run / STATE / name).unlink()
    with pytest.raises(InputError) as caught:
        fit(small_model(), corpus, RECIPE, run)
    one_line(caught, name, "step-00000004")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "four"}, {"step": -1}, {"step": None}, {"recorded": 0, "pending": []}, {"recorded": 10**6}, {"tokens": 1.5}, {"curve": [3]}, {"curve": "x"},
        {"pending": [None]}, {"seconds": []}, {"more": 1},
    ],
)
def test_a_wrong_value_in_the_progress_is_named(run, corpus, change):
    path = run / STATE / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        fit(small_model(), corpus, RECIPE, run)
    one_line(caught, "progress.json", *change)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Progress)])
def test_a_value_that_is_missing_in_the_progress_or_was_changed_is_refused(run, corpus, name):
    path = run / STATE / "progress.json"
    values = json.loads(path.read_text())
    changed = {"curve": [], "pending": [5.0]}.get(name, values[name] + 1 if name in ("tokens", "seconds", "gradient_norm") else values[name])
    for damaged in ({key: value for key, value in values.items() if key != name}, values | {name: changed}):
        if damaged == values:
            continue
        path.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=r"progress\.json is broken") as caught:
            fit(small_model(), corpus, RECIPE, run)
        # Before there were streams no state said where one stands: such states are read, and one that lost it is known by the digest.
        one_line(caught, name if name not in damaged and name != "stream" else "sha256", "remove the folder state")


@pytest.mark.parametrize("change", [{"train_config": None}, {"train_config": {"steps": "x"}}, {"model_config": 3}, {"train_config": {"stepz": 3}}])
def test_a_wrong_value_in_the_recipe_is_named(run, corpus, change):
    path = run / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        fit(small_model(), corpus, RECIPE, run)
    one_line(caught, "recipe.json is broken")


def test_a_recipe_without_a_part_is_named(run, corpus):
    path = run / "recipe.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "corpus"}))
    with pytest.raises(InputError) as caught:
        fit(small_model(), corpus, RECIPE, run)
    one_line(caught, "recipe.json is broken", "no 'corpus'")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "average.safetensors", "generators.safetensors"])
def test_a_state_of_another_model_is_refused(run, corpus, name):
    path = run / STATE / name
    tensors = load_file(path)
    first = next(key for key, tensor in tensors.items() if tensor.dim())
    for changed in ({**tensors, first: tensors[first][:1]}, {"something": torch.zeros(2)}):
        save_file(changed, path)
        if name == "optimizer.safetensors" and first in changed and tensors[first].shape[0] == 1:
            continue
        with pytest.raises(InputError) as caught:
            fit(small_model(), corpus, RECIPE, run)
        one_line(caught, "step-00000004 does not fit this run", "remove the folder state")


@pytest.mark.parametrize("name", ["recipe.json", STATE + "progress.json", "metrics.jsonl", STATE + "model.safetensors"])
def test_flipped_bytes_give_one_line_or_a_run(made, corpus, tmp_path, name):
    rng = random.Random(name)
    for number in range(15):
        run = shutil.copytree(made[1], tmp_path / f"run-{number}")
        content = bytearray((run / name).read_bytes())
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(min(len(content), 3000))] = rng.randrange(256)
        (run / name).write_bytes(content)
        try:
            fit(small_model(), corpus, RECIPE, run)
        except InputError as error:
            assert "\n" not in str(error)


# The model's weights


def test_a_config_of_many_more_layers_than_there_are_weights_is_a_short_line(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 40}))
    with pytest.raises(InputError, match="does not fit config.json beside it: Missing key") as caught:
        load_model(run)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run, value):
    path = run / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][2] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"model\.safetensors holds numbers that are not finite in model\.norm\.weight"):
        load_model(run)


def shard(run):
    tensors = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, run / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights_load_as_whole_ones(run):
    whole = weights(load_model(run))
    shard(run)
    assert torch.equal(weights(load_model(run)), whole)


def test_a_missing_shard_a_tensor_that_is_not_in_it_and_a_foreign_path_are_named(run):
    shard(run)
    index = run / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"index\.json names model\.more, which is not in model-00001-of-00002\.safetensors"):
        load_model(run)
    (run / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model-00002-of-00002\.safetensors"):
        load_model(run)
    for bad in ({"weight_map": {"model.more": "../../etc/passwd"}}, {"weight_map": [1]}, {}):
        index.write_text(json.dumps(bad))
        with pytest.raises(InputError, match=r"index\.json has no weight_map of file names"):
            load_model(run)


def test_all_files_of_a_run_have_the_same_mode(run):
    modes = {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert len(modes) == 1


def test_files_that_did_not_change_are_not_written_again(tmp_path, corpus):
    save_model(tmp_path, small_model(), corpus.tokenizer)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    save_model(tmp_path, small_model(), corpus.tokenizer)
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


# Places that cannot be written


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/run", "a part of the path is a file|a file of that name is in the way"), ("file", "which is not empty and no run directory"),
        ("x" * 300, "the name is too long"), ("nul\0in", "the name holds a null character"), ("circle/run", "symbolic links lead in a circle"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_a_run_directory_is_named(tmp_path, corpus, place, reason):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match=reason) as caught:
        fit(small_model(), corpus, RECIPE, tmp_path / place)
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["file/run", "x" * 300, "nul\0in", "circle/run"])
def test_a_place_that_cannot_be_read_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="does not exist|cannot read") as caught:
        load_model(tmp_path / place)
    assert "\n" not in str(caught.value)


FAILURES = {errno.ENOSPC: "no space is left", errno.EIO: "input/output error", errno.EROFS: "read-only", errno.EACCES: "permission is denied"}


@pytest.mark.parametrize("code", FAILURES)
@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_refusal_of_the_system_is_one_line_and_the_run_goes_on_later(tmp_path, corpus, monkeypatch, code, call, number):
    original, count = getattr(os, call), []

    def refuse(*arguments, **options):
        count.append(1)
        if len(count) >= number:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(InputError, match=rf"cannot write .*: .*{FAILURES[code]}") as caught:
            fit(small_model(), corpus, RECIPE, tmp_path / "run")
    assert "\n" not in str(caught.value) and "gam-part" not in str(caught.value)
    fit(model := small_model(), corpus, RECIPE, tmp_path / "run")
    fit(whole := small_model(), corpus, RECIPE, tmp_path / "whole")
    assert torch.equal(weights(model), weights(whole))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith("gam-part")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_device_is_named(corpus):
    with pytest.raises(InputError, match="/dev/full"):
        fit(small_model(), corpus, RECIPE, Path("/dev/full"))
    with pytest.raises(InputError, match="a file of that name is in the way|a part of the path is a file"):
        write_text(Path("/dev/full/results.json"), "{}")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_text(tmp_path / "a.txt", "text")
    assert order == ["sync", "replace", "sync"]  # the last is that of the folder


def test_a_folder_takes_the_place_of_an_older_one_whole(tmp_path):
    for content in ("old", "new"):
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / f"{content}.txt").write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new.txt"]


def test_writing_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise RuntimeError("halfway")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders there")
def test_the_next_write_removes_what_a_killed_one_left_and_not_what_another_is_writing(tmp_path):
    left, others, foreign = (tmp_path / f".{name}.{'0' * 16}.gam-part" for name in ("a.txt", "b.txt", "a.tx"))
    for path in (left, others, foreign):
        path.write_text("half")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
        assert not left.exists() and others.exists() and foreign.exists()
        write_text(tmp_path / "a.txt", "two")  # beside the one that is at work
        assert temporary.exists()
    assert (tmp_path / "a.txt").read_text() == "one" and others.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_a_process_killed_while_it_writes_leaves_nothing_once_the_file_is_written_again(tmp_path):
    child = os.fork()
    if not child:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "a.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
