"""How much context a model uses: against models of which it is known."""

import json
import math

import numpy as np
import pytest
import torch

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import Split
from gam_lm.diagnostics.context_use import context_use
from gam_lm.diagnostics.receptive_field import analytic_reach, explain, receptive_field
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.presets.models import named_model
from gam_lm.training.evaluate import evaluate

BASE = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "initialization": "scaled",
    "options": {"gam": {"num_memory_slots": 8, "num_heads": 2}, "attention": {"num_heads": 2}},
}  # fmt: skip
CLOSED = "gam-slots+write_gate=closed"
END = 0


def model_of(name, **changes):
    """Weights large enough for every path to matter."""
    model = LanguageModel(named_model(name, {**BASE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def documents(count=4, length=400):
    rng = np.random.default_rng(0)
    return np.concatenate([np.append(rng.integers(1, 32, length), END) for _ in range(count)]).astype(np.uint16)


class Copier(torch.nn.Module):
    """Predicts the token that stands ``back`` tokens before the target."""

    def __init__(self, back):
        super().__init__()
        self.back, self.config = back, ModelConfig(vocab_size=32)
        self.embed_tokens = torch.nn.Embedding(1, 1)
        self.lm_head = torch.nn.Identity()

    def hidden(self, tokens_BT):
        scores = 5.0 * torch.nn.functional.one_hot(tokens_BT, 32).float()
        return torch.nn.functional.pad(scores, (0, 0, self.back - 1, 0))[:, : tokens_BT.shape[1]], None


def test_context_use_is_the_loss_of_a_model_that_copies_from_a_known_place():
    ids = np.concatenate([np.append(np.tile(np.random.default_rng(n).permutation(np.arange(1, 32))[:20], 30), END) for n in range(4)])
    used = context_use(Copier(20), ids, END, [4, 19, 20, 40], context=64, targets=200)
    right, blind = -math.log(math.exp(5) / (math.exp(5) + 31)), math.log(32)
    for d in (20, 40, 64):  # the text repeats every 20 tokens
        assert used.nats.get(d, right) == pytest.approx(right, abs=1e-5) and used.gains.get(d, 0) == pytest.approx(0, abs=1e-6)
    for d in (4, 19):  # what it copies is cut away: it knows nothing, and is misled by nothing
        assert used.nats[d] == pytest.approx(blind, abs=1e-5) and used.gains[d] == pytest.approx(blind - right, abs=1e-5)


@pytest.mark.parametrize("name", ["gam-static", CLOSED])
def test_a_memory_that_is_never_written_gains_nothing_beyond_its_taps(name):
    model = model_of(name, max_position_embeddings=64)
    reach = analytic_reach(model.config)
    assert reach == 1 + 3 * 2
    used = context_use(model, documents(), END, [reach - 1, reach, reach + 5], context=64, targets=100)
    assert used.gains[reach] == pytest.approx(0, abs=1e-6) and used.gains[reach + 5] == pytest.approx(0, abs=1e-6)
    assert abs(used.gains[reach - 1]) > 1e-5


@pytest.mark.parametrize("name", ["gam", "gam-mean", "mamba", "transformer"])
def test_a_model_with_a_memory_depends_on_what_stands_far_back(name):
    used = context_use(model_of(name), documents(), END, [8, 32], context=64, targets=100)
    assert used.gains[8] != 0.0 and used.gains[32] != 0.0


def test_what_the_positions_do_not_allow_is_not_measurable():
    used = context_use(model_of("transformer-learned", max_position_embeddings=64), documents(), END, [16, 128], context=64, targets=50)
    assert used.gains[16] is not None and used.gains[128] is None and used.nats[128] is None


def test_contexts_lie_within_the_documents_of_their_targets():
    with pytest.raises(InputError, match="use a longer text"):
        context_use(model_of("gam-static"), documents(count=2, length=40), END, [4], context=64, targets=50)
    seen = []

    class Reader(Copier):
        def hidden(self, tokens_BT):
            seen.append(tokens_BT)
            return super().hidden(tokens_BT)

    context_use(Reader(1), documents(count=3, length=90), END, [4], context=64, targets=50)
    assert all(bool((tokens_BT[:, 1:] != END).all()) for tokens_BT in seen)


@pytest.mark.parametrize(("name", "reach"), [
    ("gam-static", 7), ("gam-paper", 7), (CLOSED, 7), ("gam", None), ("transformer-learned", None), ("transformer+window=5", 13),
    ('gam-static+mixers=["gam","attention"]+window=5', 9), ("gam-hybrid+num_hidden_layers=4+window=5", None),
])  # fmt: skip
def test_the_receptive_field_by_perturbation_is_the_analytic_one(name, reach):
    model = model_of(name, max_position_embeddings=64)
    field = receptive_field(model, length=40)
    assert field.analytic == reach
    assert field.measured == (40 if reach is None else reach)
    assert all((effect > 0) == (reach is None or distance < reach) for distance, effect in field.effects.items())
    words = explain(field, model.config)
    assert "can use everything" in words if reach is None else (f"last {reach} tokens" in words and ("write=" in words or "window" in words))


def test_a_text_beyond_learned_positions_is_named():
    with pytest.raises(InputError, match="learned positions end at 64"):
        receptive_field(model_of("transformer-learned", max_position_embeddings=64), length=65)


@pytest.mark.parametrize("name", ["gam-static", "gam-slots", "gam-mean", "mamba", "transformer", "gam-hybrid+num_hidden_layers=4+window=5"])
def test_a_stream_with_its_state_carried_has_the_loss_of_the_whole_block(name):
    ids = documents(2, 150)
    split = Split(ids=ids, documents=2, bytes=1000, words=100)
    model = model_of(name).double()
    whole = evaluate(model, split, context=len(ids) - 1)
    pieces = evaluate(model, split, context=len(ids) - 1, window=37)
    np.testing.assert_allclose(pieces.position_nats, whole.position_nats, rtol=1e-9)


def test_the_loss_by_position_adds_up_to_the_loss():
    split = Split(ids=documents(2, 150), documents=2, bytes=1000, words=100)
    found = evaluate(model_of("gam"), split, context=32)
    assert found.position_nats.shape == (32,)
    full = len(found.block_tokens) - (found.block_tokens[-1] < 32)
    assert found.block_nats[:full].sum() / (32 * full) == pytest.approx(found.position_nats.mean(), rel=0.05)


@pytest.mark.slow
def test_the_verbs_measure_a_run(tmp_path, capsys):
    folder = tmp_path / "texts"
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
        for n in range(2):
            words = np.random.default_rng(n).integers(0, 50, 900)
            (folder / split / f"{n}.txt").write_text(" ".join(f"w{w}" for w in words))
    sizes = ["--vocab-size", "300", "--hidden-size", "16", "--num-hidden-layers", "2", "--gam.num-memory-slots", "8", "--gam.num-heads", "2"]
    training = ["--steps", "3", "--batch-size", "2", "--context", "32"]
    model = tmp_path / "run"
    assert run(["train", "--data", str(folder), "--model", "gam", "--out", str(model), *sizes, *training]) == 0
    out = tmp_path / "measured"
    flags = ["--context-use", "4", "16", "64", "--targets", "50", "--stream", "--out", str(out)]
    assert run(["eval", str(model), "--data", str(folder), *flags]) == 0
    row = json.loads((out / "results.json").read_text())["rows"][0]
    assert row["context_use"]["targets"] == 50 and set(row["context_use"]["by_distance"]) == {"4", "16", "64"}
    assert all(math.isfinite(row[key]) for key in ("stream_nats_per_token", "valid_nats_per_token"))
    assert "| True tokens d | run |" in (out / "table.md").read_text().splitlines()
    assert run(["inspect", "receptive-field", str(model)]) == 0
    assert "can use everything" in capsys.readouterr().out
