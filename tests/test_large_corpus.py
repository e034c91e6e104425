"""A corpus of 10⁹ tokens: training starts at once, and holds 8 bytes a block of it."""

import tracemalloc

import numpy as np

from gam_lm.data.blocks import TrainingBlocks

TOKENS, CONTEXT, BATCH = 10**9, 1024, 8


def test_a_billion_tokens_are_mapped_and_not_read(tmp_path):
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.truncate(2 * TOKENS)  # a sparse file: it takes no room on the disk
    ids = np.memmap(path, dtype="uint16", mode="r+")
    rng = np.random.default_rng(0)
    places = np.sort(rng.integers(0, TOKENS, 1000))
    seeded = rng.integers(1, 5000, 1000)
    ids[places] = seeded  # the later of two at one place stays, in the file as below
    expected = dict(zip(places.tolist(), seeded.tolist(), strict=True))

    tracemalloc.start()
    blocks = TrainingBlocks(np.memmap(path, dtype="uint16", mode="r"), context=CONTEXT, batch_size=BATCH, seed=0)
    batches = [blocks.batch(step) for step in (0, 1, blocks.steps_per_epoch - 1)]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 * 8 * TOKENS // CONTEXT + 2_000_000  # the order of the blocks, not the tokens

    order = np.random.default_rng((0, 0)).permutation(blocks.blocks_per_epoch)
    for step, (tokens, targets) in zip((0, 1, blocks.steps_per_epoch - 1), batches, strict=True):
        for row, block in enumerate(order[step * BATCH : (step + 1) * BATCH]):
            start = int(block) * CONTEXT
            wanted = np.array([expected.get(place, 0) for place in range(start, start + CONTEXT + 1)])
            np.testing.assert_array_equal(tokens[row], wanted[:-1])
            np.testing.assert_array_equal(targets[row], wanted[1:])
