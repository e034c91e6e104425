"""Batches from parquet files that are tokenised while they are read."""

import numpy as np
import pytest

from gam_lm.data.stream import StreamedBlocks, StreamPosition, shards, to_json
from gam_lm.data.tokenizer import load_tokenizer, train_bpe
from gam_lm.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"Document {i} says {'so ' * (i % 7)}and ends." for i in range(50)]
TEXTS[3], TEXTS[20], TEXTS[49] = None, "  \n", None


@pytest.fixture
def data(tmp_path):
    """Three files of row groups of four rows, in the layout in which the Hub serves them."""
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for i, (first, last) in enumerate(((0, 18), (18, 31), (31, 50))):
        table = pa.table({"id": list(range(first, last)), "text": pa.array(TEXTS[first:last], type=pa.string())})
        pq.write_table(table, folder / f"train-{i:05}-of-00003.parquet", row_group_size=4)
    pq.write_table(pa.table({"text": ["of validation"]}), folder / "validation-00000-of-00001.parquet")
    train_bpe([text for text in TEXTS if text], 280).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "set", tmp_path / "tokenizer.json"


def ids_of(texts, tokenizer):
    tokenizer = load_tokenizer(tokenizer)
    return [i for text in texts if text and text.strip() for i in (*tokenizer.encode(text).ids, 0)]


def batches(data, count, *, start=0, **options):
    with StreamedBlocks(*data, context=5, batch_size=3, **options) as blocks:
        found = [(blocks.position, *blocks.batch(step)) for step in range(start, start + count)]
        return found, blocks.position


def test_a_stream_is_the_documents_with_an_end_after_each_epoch_after_epoch(data):
    expected = ids_of(TEXTS, data[1])
    count = 2 * len(expected) // 15 - 1
    found, position = batches(data, count)
    tokens = np.concatenate([tokens.ravel() for _, tokens, _ in found])
    targets = np.concatenate([targets.ravel() for _, _, targets in found])
    assert tokens.tolist() == (expected * 2)[: 15 * count] and targets.tolist() == (expected * 3)[1 : 15 * count + 1]
    assert all(tokens.shape == targets.shape == (3, 5) and tokens.dtype == targets.dtype == np.int64 for _, tokens, targets in found)
    assert position.epoch == 1 and position.step == count


@pytest.mark.parametrize("processes", [1, 3])
def test_a_stream_goes_on_from_any_position_as_if_it_had_never_stopped(data, processes):
    whole, _ = batches(data, 60)
    for step in (0, 1, 7, 25, 41, 55):
        position = StreamPosition(**to_json(whole[step][0]))
        again, _ = batches(data, 60 - step, start=step, position=position, processes=processes)
        for (place, tokens, targets), (other, tokens_again, targets_again) in zip(whole[step:], again, strict=True):
            assert place == other
            np.testing.assert_array_equal(tokens, tokens_again)
            np.testing.assert_array_equal(targets, targets_again)


def test_ranks_read_different_row_groups_and_together_all_of_them(data):
    seen = []
    for rank in range(3):
        with StreamedBlocks(*data, context=1, batch_size=1, rank=rank, ranks=3) as blocks:
            ids, step = [], 0
            while blocks.position.epoch == 0:
                ids.append(int(blocks.batch(step)[0][0, 0]))
                step += 1
        seen.append(load_tokenizer(data[1]).decode(ids, skip_special_tokens=False).split("<|endoftext|>")[:-1])
    assert sorted(sum(seen, [])) == sorted(text for text in TEXTS if text and text.strip())  # noqa: RUF017
    assert min(map(len, seen)) > 10


def test_positions_of_other_data_steps_out_of_order_and_too_many_ranks_are_refused(data):
    _, position = batches(data, 2)
    with pytest.raises(InputError, match="is not what the run was trained on"):
        StreamedBlocks(*data, context=5, batch_size=3, position=position, ranks=2)
    with StreamedBlocks(*data, context=5, batch_size=3) as blocks, pytest.raises(ValueError, match="stands at 0"):
        blocks.batch(1)
    with pytest.raises(InputError, match="14 row groups for 15 ranks"):
        StreamedBlocks(*data, context=5, batch_size=3, ranks=15)


def test_folders_without_text_to_stream_are_named(data, tmp_path):
    assert [path.name[:5] for path in shards(data[0])] == ["train"] * 3
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("text")
    with pytest.raises(InputError, match="only parquet files can be streamed"):
        shards(empty)
    pq.write_table(pa.table({"text": ["x"]}), empty / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="none of train"):
        shards(empty)
    pq.write_table(pa.table({"text": [" ", "\n"]}), empty / "train-00000-of-00001.parquet")
    with StreamedBlocks(empty, data[1], context=5, batch_size=3) as blocks, pytest.raises(InputError, match="has no text in the row groups"):
        blocks.batch(0)
