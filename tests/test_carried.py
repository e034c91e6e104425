"""Token ids that travel without their text: what comes back is the first part of what was prepared, and models train on it."""

import json

import numpy as np
import pytest

from gam_lm.cli.main import run
from gam_lm.data.carried import carried
from gam_lm.data.tokens import prepare
from gam_lm.presets.setups import preset

WORDS = ["river", "mill", "winter", "bridge", "below", "nobody", "spoke", "of", "the", "old", "that", "had", "taken"]
TINY = ["--vocab-size", "300", "--hidden-size", "16", "--num-hidden-layers", "1", "--context", "16", "--batch-size", "2", "--gam.num-heads", "2"]


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(WORDS, 60)) for _ in range(60)))
    return path


@pytest.fixture
def folder(text, tmp_path):
    out = tmp_path / "carried"
    command = ["data", "prepare", str(text), "--vocab-size", "300", "--carry", str(out), "--carry-tokens", "1500", "--carry-valid-tokens", "120"]
    assert run(command) == 0
    return out


def test_the_first_ids_come_back_with_their_bytes_and_their_text(text, folder):
    whole, part = prepare(str(text), vocab_size=300), carried(folder)
    for split, count in (("train", 1500), ("valid", 120)):
        own = part.splits[split]
        assert own.tokens == count and np.array_equal(own.ids, whole.splits[split].ids[:count]) and own.ids.dtype == np.uint16
        assert (folder / f"{split}.bin").stat().st_size == 2 * count
        (said,) = part.source.splits[split]()
        assert len(said.encode()) == own.bytes
    assert (part.tokenizer_sha256, part.vocab_size) == (whole.tokenizer_sha256, whole.vocab_size) and part.sha256 != whole.sha256


def test_a_comparison_runs_where_the_text_is_not(text, folder, tmp_path):
    text.unlink()
    short = ["--steps", "2", "--warmup-steps", "1", "--validate-every", "1", *TINY]
    assert run(["bench", "--preset", "gpu", "--data", str(folder), *short, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["corpus"]["tokens"] == 1500
    assert {row["model"]: row["train_tokens"] for row in results["rows"] if "train_tokens" in row} == dict.fromkeys(preset("gpu").models, 64)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "train.bin").write_bytes(b"ab"), "train.bin has not the length"), (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "carried.json").write_text("{}"), "'splits'"), (lambda folder: (folder / "carried.json").write_text("["), "not whole"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path, capsys, damage, said):
    damage(folder)
    assert run(["bench", "--data", str(folder), "--models", "gam", *TINY, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_flags_for_a_text_and_folders_of_something_else_are_refused(text, folder, tmp_path, capsys):
    assert run(["bench", "--data", str(folder), "--tokenizer", "paper", *TINY, "--out", str(tmp_path / "out")]) == 2
    assert "leave out tokenizer" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert run(["data", "prepare", str(text), "--vocab-size", "300", "--carry", str(tmp_path / "other")]) == 2
    assert "holds no carried ids" in capsys.readouterr().err
