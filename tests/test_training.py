"""Training, checkpoints and the validation number."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gam_lm.training.loop as loop
from gam_lm.checkpoint import load_model, load_tokenizer_of, save_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.inference.compiling import obstacle
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.results import identity
from gam_lm.training.compiled import compile_for_training, make_eager
from gam_lm.training.evaluate import evaluate
from gam_lm.training.loop import fit, make_optimizer, new_model, train_step
from gam_lm.training.precision import choose_device, choose_dtype
from gam_lm.training.recipe import TrainConfig

RECIPE = TrainConfig(steps=14, batch_size=4, context=16, learning_rate=3e-3, warmup_steps=2, precision="fp32", validate_every=7, checkpoint_every=5)


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta"]
    for split, count in (("train", 3000), ("valid", 300)):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{split}.txt").write_text(" ".join(rng.choice(words, count)) + "\n")
    return prepare(str(tmp_path / "text"), vocab_size=270)


def config(**changes):
    sizes = {
        "vocab_size": 270,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "options": (GAMOptions(write="none", gate_activation="sigmoid", num_memory_slots=8),),
        "initialization": "scaled",
        "dropout": 0.1,
    }
    return ModelConfig(**(sizes | changes))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_lowers_the_loss_and_writes_a_whole_run_directory(corpus, tmp_path):
    model = new_model(config(), 0)
    trained = fit(model, corpus, RECIPE.replace(steps=60), tmp_path / "run")
    assert trained.curve[-1]["val_nats"] < trained.curve[0]["val_nats"] < math.log(270)
    assert trained.tokens == 60 * 4 * 16 and trained.steps == 60
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({*range(10, 61, 10), *range(7, 61, 7), 60})
    loaded = load_model(tmp_path / "run")
    assert torch.equal(weights(loaded), weights(model)) and loaded.config == model.config
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert load_tokenizer_of(tmp_path / "run").to_str() == corpus.tokenizer.to_str()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "gam"


def test_no_weight_is_written_twice_and_names_are_those_of_hugging_face(tmp_path):
    from safetensors.torch import load_file

    tied, untied = new_model(config(), 0), new_model(config(tie_word_embeddings=False), 0)
    save_model(tmp_path / "tied", tied)
    save_model(tmp_path / "untied", untied)
    names = set(load_file(tmp_path / "tied" / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "model.norm.weight" in names and all(name.startswith("model.") for name in names)
    assert set(load_file(tmp_path / "untied" / "model.safetensors")) == names | {"lm_head.weight"}
    assert torch.equal(weights(load_model(tmp_path / "untied")), weights(untied))


@pytest.mark.parametrize("killed_after", [3, 5, 8, 13])
def test_a_killed_run_goes_on_as_the_same_run(corpus, tmp_path, monkeypatch, killed_after):
    whole = new_model(config(), 0)
    expected = fit(whole, corpus, RECIPE, tmp_path / "whole")

    class Killed(Exception):
        pass

    original, count = loop.train_step, []

    def step(*arguments):
        if len(count) == killed_after:
            raise Killed
        count.append(1)
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(Killed):
        fit(new_model(config(), 0), corpus, RECIPE, tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", original)
    again = new_model(config(), 0)
    trained = fit(again, corpus, RECIPE, tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))
    assert [p["val_nats"] for p in trained.curve] == [p["val_nats"] for p in expected.curve]

    def losses(run):
        return [(line["step"], line["train_nats"]) for line in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())]

    assert losses("run") == losses("whole")


def test_an_interrupted_run_keeps_what_it_has(corpus, tmp_path, monkeypatch):
    original, count = loop.train_step, []

    def step(*arguments):
        count.append(1)
        if len(count) == 8:
            signal.raise_signal(signal.SIGINT)  # within the step, which is finished first
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(config(), 0), corpus, RECIPE, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000008"]


def test_the_same_seed_is_the_same_run_and_another_seed_another(corpus, tmp_path):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = new_model(config(), seed)
        fit(model, corpus, RECIPE.replace(steps=3, seed=seed), tmp_path / name)
        runs[name] = weights(model)
    assert torch.equal(runs["a"], runs["b"]) and not torch.equal(runs["a"], runs["c"])


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation_equals_one_big_batch(parts):
    tokens = np.random.default_rng(0).integers(0, 270, (4, 9))
    targets = np.where(np.random.default_rng(1).random((4, 8)) < 0.5, -100, tokens[:, 1:])  # parts with unequal counts
    targets[0, 0] = 3
    batch = (tokens[:, :-1], targets)
    found = []
    for accumulate in (1, parts):
        model = new_model(config(dropout=0.0), 0).double()
        recipe = RECIPE.replace(accumulate=accumulate, clip=0.0)
        loss, norm, counted = train_step(model, make_optimizer(model, recipe), batch, recipe, 1e-3, torch.float32)
        found.append((float(loss), float(norm), weights(model)))
        assert counted == int((targets != -100).sum())
    (loss, norm, one), (loss_parts, norm_parts, several) = found
    assert abs(loss - loss_parts) <= 1e-6 * loss and abs(norm - norm_parts) <= 1e-6 * norm
    assert (one - several).abs().max() <= 1e-6 * one.abs().max()


def test_the_gradient_is_clipped_and_vectors_do_not_decay():
    model = new_model(config(dropout=0.0), 0)
    recipe = RECIPE.replace(optimizer="adamw", clip=1e-3)
    optimizer = make_optimizer(model, recipe)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in optimizer.param_groups[0]["params"]) and all(p.dim() < 2 for p in optimizer.param_groups[1]["params"])
    everything = make_optimizer(model, recipe.replace(decay="everything"))
    assert [group["weight_decay"] for group in everything.param_groups] == [0.1]


@pytest.mark.parametrize("context", [7, 16])
def test_the_validation_number_is_that_of_every_block_by_hand(corpus, context):
    model = new_model(config(), 0)
    ids = torch.tensor(corpus.splits["valid"].ids.astype(np.int64))
    total, count = 0.0, 0
    model.eval()
    for start in range(0, len(ids) - 1, context):
        block = ids[start : start + context + 1]
        logits, _ = model(block[None, :-1])
        total += float(F.cross_entropy(logits[0], block[1:], reduction="sum").detach())
        count += len(block) - 1
    assert count == len(ids) - 1
    for batch_size in (1, 5, 64):
        measured = evaluate(model, corpus.splits["valid"], context=context, batch_size=batch_size)
        assert measured.block_tokens.sum() == count
        assert measured.nats_per_token == pytest.approx(total / count, rel=1e-5)
    figures = measured.figures("val")
    split = corpus.splits["valid"]
    assert figures["val_ppl"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert figures["val_bits_per_byte"] == pytest.approx(total / math.log(2) / split.bytes, rel=1e-4)
    assert figures["val_word_ppl"] == pytest.approx(math.exp(total / split.words), rel=1e-4)


def test_the_papers_blocks_leave_tokens_out_and_no_bytes(corpus):
    measured, split = evaluate(new_model(config(), 0), corpus.splits["valid"], context=7, overlap=False), corpus.splits["valid"]
    assert measured.block_tokens.sum() < 0.9 * (split.tokens - 1)
    total = measured.nats_per_token * (split.tokens - 1)
    figures = measured.figures("val")
    assert figures["val_bits_per_byte"] == pytest.approx(total / math.log(2) / split.bytes)
    assert figures["val_word_ppl"] == pytest.approx(math.exp(total / split.words))


def test_when_it_is_validated_decides_what_the_best_state_is_and_nothing_else():
    every = [{"validate_every": number, "checkpoint_every": number} for number in (5, 10)]
    last, best = ([TrainConfig(keep=keep, **each) for each in every] for keep in ("last", "best"))
    assert last[0].same_run(last[1]) and not best[0].same_run(best[1]) and best[0].same_run(best[0].replace(checkpoint_every=7))
    rows = [[{"model": "gam", "train_config": each.to_dict()} for each in two] for two in (last, best)]
    assert identity(rows[0][0]) == identity(rows[0][1]) and identity(rows[1][0]) != identity(rows[1][1])


def test_evaluation_leaves_the_model_in_its_mode(corpus):
    model = new_model(config(), 0).train()
    evaluate(model, corpus.splits["valid"], context=8)
    assert model.training


def test_a_folder_of_another_run_is_refused_and_left_alone(corpus, tmp_path):
    fit(new_model(config(), 0), corpus, RECIPE.replace(steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds another run"):
        fit(new_model(config(), 0), corpus, RECIPE.replace(steps=2), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        fit(new_model(config(), 0), corpus, RECIPE, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_context_beyond_the_positions_is_named_before_anything_is_written(corpus, tmp_path):
    model = new_model(config(positions="learned", max_position_embeddings=8), 0)
    with pytest.raises(InputError, match="context is 16, learned positions end at 8"):
        fit(model, corpus, RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_run_with_a_missing_or_truncated_file_is_named(corpus, tmp_path, name):
    run = tmp_path / "run"
    fit(new_model(config(), 0), corpus, RECIPE.replace(steps=1), run)
    read = load_tokenizer_of if name == "tokenizer.json" else load_model
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name) as caught:
        read(run)
    assert "\n" not in str(caught.value)
    (run / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        read(run)
    shutil.rmtree(run)
    with pytest.raises(InputError, match="does not exist"):
        read(run)


def test_a_config_that_does_not_fit_the_weights_is_named(corpus, tmp_path):
    save_model(tmp_path, new_model(config(), 0))
    stored = json.loads((tmp_path / "config.json").read_text())
    options = {"gam": stored["options"]["gam"] | {"num_memory_slots": 9}}
    (tmp_path / "config.json").write_text(json.dumps(stored | {"options": options}))
    with pytest.raises(InputError, match="does not fit config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored | {"hiden_size": 9}))
    with pytest.raises(InputError, match="did you mean 'hidden_size'"):
        load_model(tmp_path)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    import gam_lm.runtime.tensor_files as module

    def full(*arguments, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(InputError, match="cannot write .*model.safetensors.*No space left"):
        save_model(tmp_path / "run", new_model(config(), 0))


def test_device_and_precision_are_chosen_with_a_reason(caplog):
    with caplog.at_level("INFO", "gam_lm"):
        device = choose_device("cpu")
        dtype = choose_dtype("auto", device)
    unit = "a" if dtype == torch.bfloat16 else "no"
    assert dtype in (torch.float32, torch.bfloat16) and f"cpu has {unit} matrix unit for bf16" in caplog.text
    with pytest.raises(InputError, match="device is 'cuda:99'|device is 'nothing'"):
        choose_device("nothing")
    for name in ("meta", "hpu"):  # no device of this machine, or none that holds numbers
        with pytest.raises(InputError, match=f"device is '{name}', which is not here"):
            choose_device(name)


def test_an_optional_tracker_gets_the_figures(corpus, tmp_path):
    tensorboard = pytest.importorskip("tensorboard")
    from gam_lm.training.trackers import make_tracker

    assert tensorboard
    tracker = make_tracker("tensorboard", tmp_path / "track", {})
    fit(new_model(config(), 0), corpus, RECIPE, tmp_path / "run", tracker=tracker)
    assert list((tmp_path / "track" / "tensorboard").glob("events*"))


def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    from gam_lm.training.trackers import make_tracker

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="tracker wandb needs wandb: pip install wandb"):
        make_tracker("wandb", tmp_path, {})


@pytest.mark.slow
@pytest.mark.skipif(obstacle(torch.device("cpu")) is not None, reason="no compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look, which it hides where warnings are no errors
def test_a_compiled_run_has_the_losses_of_an_eager_one_dropout_included(corpus, tmp_path, caplog):
    caplog.set_level("INFO", "gam_lm")
    runs = {}
    for how in ("off", "on"):
        model = new_model(config(), 0)
        trained = fit(model, corpus, RECIPE.replace(compile=how), tmp_path / how)
        lines = map(json.loads, (tmp_path / how / "metrics.jsonl").read_text().splitlines())
        runs[how] = [line["train_nats"] for line in lines] + [point["val_nats"] for point in trained.curve]
    assert runs["on"] == pytest.approx(runs["off"], rel=1e-4) and runs["on"] != runs["off"]  # other rounding: it was compiled
    assert sum("compiled: the blocks" in record.message for record in caplog.records) == 1
    assert all(layer._compiled_call_impl is None for layer in model.layers)


def test_what_is_compiled_is_said_or_why_nothing_is(monkeypatch, caplog):
    caplog.set_level("INFO", "gam_lm")

    def parts(model, **recipe):
        caplog.clear()
        found = compile_for_training(model, RECIPE.replace(**recipe), 100)
        make_eager(found)
        return found, caplog.messages

    static, mamba = new_model(config(), 0), new_model(config(mixers=("mamba",), options=()), 0)
    assert parts(static) == ([], []) and parts(static, compile="off") == ([], [])  # a short run says nothing
    assert parts(mamba, compile="on")[0] == [] and "not compiled: mamba" in parts(mamba, compile="on")[1][-1]
    if obstacle(torch.device("cpu")) is None:
        monkeypatch.setattr("gam_lm.training.compiled.WORTH", {"cpu": 1.0})
        assert parts(static)[0] == list(static.layers)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert parts(static, compile="on") == ([], ["not compiled: no C++ compiler 'no-such-compiler' found"])
