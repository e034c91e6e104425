"""Equal sizes, and the floors below every table."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from gam_lm.experiments.floors import bigram_nats, unigram_nats, xz_bytes
from gam_lm.experiments.models import CLOSE_ENOUGH, contender
from gam_lm.model import count_parameters
from gam_lm.presets.models import MODELS, SIZED_BY
from gam_lm.presets.setups import PRESETS

SETTINGS = [{"vocab_size": preset.vocab_size, **preset.model} for preset in PRESETS.values()]


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mamba-paper"}))
@pytest.mark.parametrize("base", SETTINGS[:3], ids=list(PRESETS)[:3])
def test_contenders_have_the_parameters_of_the_static_gam(name, base):
    _, config = contender(name, base, match=True)
    target = count_parameters(contender(SIZED_BY, base, match=False)[1])
    assert abs(count_parameters(config) - target) <= CLOSE_ENOUGH * target
    assert config.mixers == contender(name, base, match=False)[1].mixers


def test_the_papers_sizes_are_left_as_published():
    _, config = contender("transformer-paper", {"vocab_size": 10_000}, match=False)
    assert count_parameters(config) == 24_166_400


def test_the_floors_are_the_smoothed_counts_by_hand():
    rng = np.random.default_rng(0)
    train, valid, V = rng.integers(0, 6, 200), rng.integers(0, 8, 60), 8  # 6 and 7 were never seen
    counts = Counter(train.tolist())
    unigram = {x: (counts[x] + 1) / (200 + V) for x in range(V)}
    assert sum(unigram.values()) == pytest.approx(1)
    assert unigram_nats(train, valid, V) == pytest.approx(-np.mean([math.log(unigram[x]) for x in valid[1:].tolist()]))

    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))

    def bigram(x, y):
        followed = sum(count for (a, _), count in pairs.items() if a == x)
        kinds = sum(1 for a, _ in pairs if a == x)
        return (pairs[x, y] + kinds * unigram[y]) / (followed + kinds) if followed else unigram[y]

    assert sum(bigram(2, y) for y in range(V)) == pytest.approx(1)
    by_hand = -np.mean([math.log(bigram(x, y)) for x, y in zip(valid[:-1].tolist(), valid[1:].tolist(), strict=True)])
    assert bigram_nats(train, valid, V) == pytest.approx(by_hand)


def test_the_floors_of_marked_texts_are_those_of_the_tokens_that_count():
    """Answers between questions: the same as the counts over a list of the pairs whose second token counts."""
    draw = np.random.default_rng(1)
    V, train, valid = 5, draw.integers(0, 5, 60), draw.integers(0, 5, 30)
    masks = draw.random(60) < 0.5, draw.random(30) < 0.5
    masks[0][0] = masks[1][0] = False
    pairs, wanted = ([(x, y) for x, y, counts in zip(ids, ids[1:], mask[1:], strict=False) if counts] for ids, mask in zip((train, valid), masks, strict=True))

    def unigram(y):
        return (sum(b == y for _, b in pairs) + 1) / (len(pairs) + V)

    def bigram(x, y):
        after = [b for a, b in pairs if a == x]
        kinds = len(set(after)) or 1
        return (after.count(y) + kinds * unigram(y)) / (len(after) + kinds)

    assert unigram_nats(train, valid, V, masks) == pytest.approx(-np.mean([math.log(unigram(y)) for _, y in wanted]))
    assert bigram_nats(train, valid, V, masks) == pytest.approx(-np.mean([math.log(bigram(x, y)) for x, y in wanted]))


def test_the_xz_floor_is_the_size_that_xz_gives():
    documents = ["naïve " * 700, "and something else\n" * 400, ""]
    whole = lzma.compress("".join(documents).encode(), preset=9 | lzma.PRESET_EXTREME)
    assert abs(xz_bytes(documents) - len(whole)) <= 8  # the header names another window
    assert xz_bytes(iter(documents)) == xz_bytes(documents)
