"""Paired differences over seeds and blocks, and `gam compare`."""

import json
import math

import numpy as np
import pytest

from gam_lm.cli.main import run
from gam_lm.report.compare import compare
from gam_lm.report.statistics import paired_blocks, shown, verdict
from gam_lm.results import write_blocks

TOKENS = np.array([256] * 99 + [40])


def experiment(rng, gap=0.0, seeds=4, seed_noise=0.01, block_noise=0.05):
    """Two models on the same seeds and blocks: hard and easy blocks, neighbours alike, that the pairing must take out."""
    hardness = np.cumsum(rng.normal(size=len(TOKENS)))
    apart = np.convolve(rng.normal(size=len(TOKENS) + 4), np.full(5, 5**-0.5), "valid") * block_noise  # differences of neighbours go together
    a, b = [], []
    for _ in range(seeds):
        common = hardness + rng.normal()
        mine = common + apart + gap + rng.normal() * seed_noise + rng.normal(size=len(TOKENS)) * 0.02
        a.append((mine * TOKENS, TOKENS))
        b.append((common * TOKENS, TOKENS))
    return a, b


def test_the_interval_holds_the_truth_as_often_as_it_says_and_is_narrow():
    rng = np.random.default_rng(0)
    trials = [paired_blocks(*experiment(rng)) for _ in range(300)]
    held = np.mean([not shown(each) for each in trials])
    assert 0.92 <= held <= 1.0
    assert np.mean([each.half_width for each in trials]) < 0.04  # unpaired, the seeds alone would make it 1
    detected = np.mean([shown(paired_blocks(*experiment(rng, gap=0.08))) for _ in range(100)])
    assert detected > 0.95


def test_the_difference_is_that_of_the_losses_per_token():
    a, b = experiment(np.random.default_rng(1), gap=0.3)
    nats = [sum(x[0].sum() for x in each) / (len(each) * TOKENS.sum()) for each in (a, b)]
    assert paired_blocks(a, b).mean == pytest.approx(nats[0] - nats[1])
    assert paired_blocks(b, a).half_width == pytest.approx(paired_blocks(a, b).half_width)


def test_one_seed_tells_of_the_text_alone_and_says_so():
    a, b = experiment(np.random.default_rng(2), gap=0.3, seeds=1)
    summary = paired_blocks(a, b)
    assert summary.count == 1 and math.isfinite(summary.half_width) and shown(summary)
    assert "one seed does not tell models apart" in verdict(summary, "a", "b", "nats")


def test_blocks_of_another_length_are_refused():
    a, b = experiment(np.random.default_rng(3))
    with pytest.raises(ValueError, match="not the same"):
        paired_blocks(a, [(nats, tokens + 1) for nats, tokens in b])


CORPUS = {"name": "novels", "sha256": "ab" * 32, "tokens": 1000, "bytes": 4000, "tokenizer": "bpe", "tokenizer_sha256": "cd"}


def written(directory, models, corpus=CORPUS, seeds=(0, 1)):
    rows = []
    for name, nats in models.items():
        for seed in seeds:
            losses = nats + np.random.default_rng(seed).normal(size=len(TOKENS)) * 0.1
            blocks = write_blocks(directory, f"{name}-seed{seed}", losses * TOKENS, TOKENS)
            rows.append({
                "model": name, "seed": seed, "model_config": {"hidden_size": 8}, "val_blocks": blocks,
                "val_nats_per_token": float((losses * TOKENS).sum() / TOKENS.sum()),
            })  # fmt: skip
    (directory / "results.json").write_text(json.dumps({"command": "gam bench", "environment": {}, "corpus": corpus, "rows": rows}))
    return str(directory)


def test_compare_takes_folders_files_and_models(tmp_path):
    first = written(tmp_path / "a", {"gam": 5.0, "mamba": 5.2})
    second = written(tmp_path / "b", {"gam": 5.0, "mamba": 5.1})
    (said,) = compare(f"{first}:gam", f"{first}/results.json:mamba")
    assert said.startswith("gam is lower than mamba by 0.2000 ± 0.0000 nats/token (2 seeds, paired)")
    same, different = compare(first, second)
    assert [sentence.split(" ")[0] for sentence in compare(f"{first}:gam", first)] == ["gam"]  # with the other model of its folder
    assert "no difference shown" in same and "lower" in different and "mamba of" in different


@pytest.mark.parametrize(
    ("second", "said"),
    [("{b}:gma", "did you mean 'gam'"), ("{other}:gam", "another text"), ("{seeds}:gam", "no seed in common"), ("{none}", "no such file"), ("{else}", "name one model of each")],
)
def test_what_cannot_be_compared_is_named(second, said, tmp_path, capsys):
    places = {
        "b": written(tmp_path / "b", {"gam": 5.0, "mamba": 5.0}), "none": tmp_path / "none",
        "else": written(tmp_path / "else", {"x": 5.0, "y": 5.0}),
        "other": written(tmp_path / "other", {"gam": 5.0}, CORPUS | {"sha256": "other"}),
        "seeds": written(tmp_path / "seeds", {"gam": 5.0}, seeds=(7, 8)),
    }  # fmt: skip
    first = written(tmp_path / "a", {"gam": 5.0, "delta": 5.0}) + (":gam" if ":" in second else "")
    assert run(["compare", first, second.format(**places)]) == 2
    assert said in capsys.readouterr().err
