"""Batches from parquet files that are tokenised while they are read."""

import json

import numpy as np
import pytest
import torch
from processes import in_processes
from stacks import stack

from gam_lm.checkpoint import load_model
from gam_lm.cli.main import run
from gam_lm.data.shards import Shard, data_set, text_bytes, with_validation
from gam_lm.data.stream import Position, StreamedBlocks, lane_of, lanes_for
from gam_lm.data.tokenizer import load_tokenizer, train_bpe
from gam_lm.data.tokens import prepare_corpus
from gam_lm.errors import InputError
from gam_lm.training.batches import Stream
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"Document {i} says {'so ' * (i % 7)}and ends." for i in range(50)]
TEXTS[3], TEXTS[20], TEXTS[49] = None, "  \n", None


@pytest.fixture
def folder(tmp_path):
    """Three files of row groups of four rows, in the layout in which the Hub serves them."""
    found = tmp_path / "set" / "data"
    found.mkdir(parents=True)
    for i, (first, last) in enumerate(((0, 18), (18, 31), (31, 50))):
        table = pa.table({"id": list(range(first, last)), "text": pa.array(TEXTS[first:last], type=pa.string())})
        pq.write_table(table, found / f"train-{i:05}-of-00003.parquet", row_group_size=4)
    pq.write_table(pa.table({"text": [f"Of validation, {'so ' * i}." for i in range(9)]}), found / "validation-00000-of-00001.parquet")
    train_bpe([text for text in TEXTS if text], 280).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "set"


@pytest.fixture
def data(folder):
    return data_set(str(folder)).train, folder.parent / "tokenizer.json"


def ids_of(texts, tokenizer):
    tokenizer = load_tokenizer(tokenizer)
    return [i for text in texts if text and text.strip() for i in (*tokenizer.encode(text).ids, 0)]


def batches(data, count, *, start=0, lanes=1, **options):
    with StreamedBlocks(*data, context=5, batch_size=3, lanes=lanes, **options) as blocks:
        found = [(blocks.position, *blocks.batch(step)) for step in range(start, start + count)]
        return found, blocks.position


def test_a_lane_is_the_documents_with_an_end_after_each_epoch_after_epoch(data):
    expected = ids_of(TEXTS, data[1])
    count = 2 * len(expected) // 15 - 1
    found, position = batches(data, count)
    tokens = np.concatenate([tokens.ravel() for _, tokens, _ in found])
    targets = np.concatenate([targets.ravel() for _, _, targets in found])
    assert tokens.tolist() == (expected * 2)[: 15 * count] and targets.tolist() == (expected * 3)[1 : 15 * count + 1]
    assert all(tokens.shape == targets.shape == (3, 5) and tokens.dtype == targets.dtype == np.int64 for _, tokens, targets in found)
    assert position.lanes[0].epoch == 1 and position.step == count


@pytest.mark.parametrize("lanes, processes", [(1, 1), (3, 2)])
def test_a_stream_goes_on_from_any_position_as_if_it_had_never_stopped(data, lanes, processes):
    whole, _ = batches(data, 60, lanes=lanes)
    for step in (0, 7, 41, 55):
        position = Position.from_json(json.loads(json.dumps(whole[step][0].to_json())))
        again, _ = batches(data, 60 - step, start=step, lanes=lanes, position=position, processes=processes)
        for (place, tokens, targets), (other, tokens_again, targets_again) in zip(whole[step:], again, strict=True):
            assert place == other
            np.testing.assert_array_equal(tokens, tokens_again)
            np.testing.assert_array_equal(targets, targets_again)


@pytest.mark.parametrize("lanes", [2, 3, 6])
def test_processes_read_what_of_a_batch_is_theirs_and_no_other_lane(data, lanes):
    options = {"context": 4, "batch_size": 6, "lanes": lanes}
    with StreamedBlocks(*data, **options) as all_rows:
        whole = [all_rows.batch(step) for step in range(20)]
    for count in (1, 2, 3):
        for rows in np.array_split(np.arange(6), count):
            with StreamedBlocks(*data, **options, rows=range(rows[0], rows[-1] + 1)) as own:
                for step, (tokens, targets) in enumerate(whole):
                    found = own.batch(step)
                    np.testing.assert_array_equal(found[0][rows], tokens[rows])
                    np.testing.assert_array_equal(found[1][rows], targets[rows])
                assert set(own.position.lanes) == {lane_of(row, 6, lanes) for row in rows}


def test_lanes_read_different_documents_and_together_all_of_them(data):
    lanes = lanes_for(data[0], 64, 2)
    assert lanes == 14 and lanes_for(data[0], 3, 1) == lanes_for(data[0] * 9, 3, 40) == 3 and lanes_for(data[0] * 9, 64, 20) == 20
    seen = []
    for lane in range(lanes):
        with StreamedBlocks(*data, context=1, batch_size=lanes, lanes=lanes, rows=range(lane, lane + 1)) as blocks:
            ids, step = [], 0
            while blocks.position.lanes[lane].epoch == 0:
                ids.append(int(blocks.batch(step)[0][lane, 0]))
                step += 1
        seen += load_tokenizer(data[1]).decode(ids, skip_special_tokens=False).split("<|endoftext|>")[:-1]
    assert sorted(seen) == sorted(text for text in TEXTS if text and text.strip())


def test_positions_of_other_data_steps_out_of_order_and_too_many_lanes_are_refused(data):
    _, position = batches(data, 2)
    with pytest.raises(InputError, match="is not what the run was trained on"):
        StreamedBlocks(*data, context=5, batch_size=3, lanes=2, position=position)
    with StreamedBlocks(*data, context=5, batch_size=3, lanes=1) as blocks, pytest.raises(ValueError, match="stands at 0"):
        blocks.batch(1)
    with pytest.raises(InputError, match="14 row groups for 15 lanes"):
        StreamedBlocks(*data, context=5, batch_size=15, lanes=15)
    with pytest.raises(InputError, match="position in the stream is broken"):
        Position.from_json({"data": "x", "step": 0, "lanes": {"0": {"page": 3}}})


def test_an_address_is_read_as_a_path_is(data):
    pytest.importorskip("fsspec")
    elsewhere = [shard._replace(path=f"file://{shard.path}") for shard in data[0]]
    here, there = (batches((shards, data[1]), 20, lanes=3)[0] for shards in (data[0], elsewhere))
    for one, other in zip(here, there, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


def test_folders_without_text_to_stream_are_named(folder, data, tmp_path):
    assert [shard.name[:5] for shard in data[0]] == ["train"] * 3
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("text")
    with pytest.raises(InputError, match="only parquet files can be streamed"):
        data_set(str(empty))
    pq.write_table(pa.table({"text": ["x"]}), empty / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="none of train"):
        data_set(str(empty))
    pq.write_table(pa.table({"text": [" ", "\n"]}), empty / "train-00000-of-00001.parquet")
    shards = data_set(str(empty)).train
    with StreamedBlocks(shards, data[1], context=5, batch_size=3, lanes=1) as blocks, pytest.raises(InputError, match="has no text in its row groups"):
        blocks.batch(0)
    with pytest.raises(InputError, match="no validation split"):
        with_validation(data_set(str(empty)))
    for split in ("validation", "test"):
        (folder / "data" / f"{split}-00000-of-00001.parquet").unlink(missing_ok=True)
    rest, head = with_validation(data_set(str(folder)))  # the last file is kept for validation, and nobody trains on it
    assert len(rest.train) == 2 and next(head.splits["valid"]()) == TEXTS[31]


def test_only_the_training_split_is_streamed_wherever_its_name_stands(tmp_path):
    (tmp_path / "dev").mkdir()
    layouts = {
        "deep": ("train/en/a", "test/en/b", "Validation/en/c"), "languages": ("en/train/a", "de/train-1", "en/test/b", "en/Val/c"),
        "dev": ("train-a", "test-b", "dev-c"), "both": ("train/a", "valid/c", "train_dev"),
    }  # fmt: skip
    for name, files in layouts.items():
        for file in files:
            path = tmp_path / "dev" / name / f"{file}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": ["x"]}), path)
    (tmp_path / "dev" / "both" / "more.jsonl").write_text('{"text": "x"}\n')
    found = {name: data_set(str(tmp_path / "dev" / name)) for name in layouts}
    assert {name: ([shard.name for shard in each.train], [shard.name for shard in each.valid]) for name, each in found.items()} == {
        "deep": (["a.parquet"], ["c.parquet"]), "languages": (["a.parquet"], ["c.parquet"]),
        "dev": (["train-a.parquet"], ["dev-c.parquet"]), "both": (["a.parquet"], ["c.parquet"]),
    }  # fmt: skip
    assert found["both"].left_out.in_files() == [
        "1 file or folder of a kind that is not read: more.jsonl", "1 file or folder in no split (the folder has a part called train): train_dev.parquet",
    ]  # fmt: skip
    assert "train-1.parquet" in found["languages"].left_out.in_files()[0]


def test_the_head_of_a_stream_names_the_rows_without_text(folder, tmp_path):
    prepared = prepare_corpus(with_validation(data_set(str(folder)))[1], vocab_size=280, cache=tmp_path / "cache")
    assert prepared.left_out == (
        "2 documents without text (null): in train-00000-of-00003.parquet, train-00002-of-00003.parquet",
        "1 document of white space alone: in train-00001-of-00003.parquet",
    )


def test_the_text_of_packed_files_is_counted_unpacked(tmp_path):
    pq.write_table(pa.table({"text": [f"{i} " + "word " * 2000 for i in range(20)], "id": list(range(20))}), tmp_path / "a.parquet", compression="zstd")
    size = (tmp_path / "a.parquet").stat().st_size
    assert size < 50_000
    assert text_bytes([Shard(str(tmp_path / "a.parquet"), "a", size)] * 3) == pytest.approx(3 * 20 * 10_003, rel=0.05)


RECIPE = TrainConfig(steps=12, batch_size=6, context=8, precision="fp32", validate_every=6)


def streamed(rank, folder, out, size, steps=None):
    """Train on the stream, as one of ``size`` processes, up to an interruption in step ``steps``."""
    import gam_lm.training.loop as loop

    found, head = with_validation(data_set(str(folder)))
    corpus = prepare_corpus(head, vocab_size=280, cache=folder.parent / "cache")
    original, done = loop.train_step, []

    def step(*arguments):
        done.append(1)
        if len(done) == steps:
            import signal

            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    loop.train_step = step
    try:
        fit(new_model(stack("gam", vocab_size=280), 0).double(), corpus, RECIPE, out, stream=Stream(shards=found.train, lanes=6), shard=size > 1)
    except KeyboardInterrupt:
        assert steps is not None
    finally:
        loop.train_step = original


@pytest.mark.slow
def test_a_streamed_run_goes_on_with_another_number_of_processes(folder, tmp_path):
    streamed(0, folder, tmp_path / "one", 1)
    in_processes(2, streamed, tmp_path, folder, tmp_path / "moved", 2, 4)
    streamed(0, folder, tmp_path / "moved", 1)
    one, moved = (torch.cat([p.detach().flatten() for p in load_model(tmp_path / name).parameters()]) for name in ("one", "moved"))
    assert (moved - one).norm() < 1e-9 * one.norm()
    figures = [[json.loads(line)["tokens"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "moved")]
    assert figures[0] == figures[1]


def test_the_command_streams_and_says_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--vocab-size", "280", "--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--context", "8", "--batch-size", "4",
             "--steps", "4", "--precision", "fp32", "--device", "cpu"]  # fmt: skip
    assert run(["train", "--data", str(folder), "--stream", *flags, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "streamed in 4 lanes" in said and "4 steps of 4 × 8 tokens, 128 tokens of the stream" in said
    assert run(["train", "--out", str(tmp_path / "run")]) == 0  # goes on, here: is finished
    assert json.loads(next((tmp_path / "run" / "state").glob("step-*/progress.json")).read_text())["stream"]["step"] == 4
    capsys.readouterr()
    for more, message in ((["--train-rows", "3"], "train_rows is given with --stream"), (["--shuffle-documents"], "shuffle_documents and blocks")):
        assert run(["train", "--data", str(folder), "--stream", *flags, *more, "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
    assert run(["train", "--data", str(folder / "data" / "none"), "--stream", *flags, "--out", str(tmp_path / "other")]) == 2
    assert "is no folder here" in capsys.readouterr().err.splitlines()[-1]


def test_a_shard_is_known_by_name_and_size(data):
    _, position = batches(data, 1)
    renamed = [Shard(shard.path, f"other-{shard.name}", shard.size) for shard in data[0]]
    assert StreamedBlocks(renamed, data[1], context=5, batch_size=3, lanes=1).position.data != position.data
