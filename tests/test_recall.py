"""The recall tasks: their answers, looked up by hand in the tokens; and that a model which can find them does."""

import json
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.experiments.models import activations_per_token
from gam_lm.experiments.recall import recall as measure_recall
from gam_lm.experiments.recall_accuracy import TEST_SEQUENCES, TUNING_SEQUENCES, accuracy
from gam_lm.experiments.recall_tasks import SWAPS, TRACKING, RecallTask
from gam_lm.experiments.search import Range, Search
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.report.recall import recall, recall_by_gap, recall_by_length, recall_differences, recall_plots, recall_steps, recall_table
from gam_lm.results import Results, read_results
from gam_lm.runtime.workers import claimed
from gam_lm.training.recipe import TrainConfig

SIZES = {"mqar": 6, "zoology": 6, "forgetting": 6, "copying": 6, "induction": 1}


def samples(task, batch=64, **options):
    task = RecallTask(**{"task": task, "pairs": SIZES.get(task, 1), "length": 64, "vocab": 64} | options)
    return task, *task.sample(batch, np.random.default_rng(0))


def answer_of(task, tokens, place):
    """What the task's rule gives at ``place``, found by reading the tokens from the left."""
    if task.task in ("mqar", "zoology", "forgetting"):
        bound = task.pairs + (task.pairs // 2 if task.task == "forgetting" else 0)
        memory = dict(zip(tokens[0 : 2 * bound : 2], tokens[1 : 2 * bound : 2], strict=True))  # a later binding replaces an earlier one
        return memory[tokens[place]]
    if task.task == "copying":
        return [token for token in tokens if token > 1][place - (task.length - task.pairs)]
    return tokens[list(tokens[:-1]).index(0) + 1]


@pytest.mark.parametrize("name", SIZES)
def test_the_answers_stand_in_the_text(name):
    task, tokens, targets, gaps = samples(name)
    assert ((targets != IGNORE).sum(1) == task.pairs).all()
    for row, place in zip(*np.nonzero(targets != IGNORE), strict=True):
        assert targets[row, place] == answer_of(task, tokens[row], place)
        # The gap leads back to the token before the answer; in copying to the answer.
        source = place - gaps[row, place] + (name != "copying")
        assert tokens[row, source] == targets[row, place] and source <= place


@pytest.mark.parametrize("name", ["mqar", "forgetting"])
def test_every_key_is_asked_once_and_filler_never_holds_one(name):
    task, tokens, targets, _ = samples(name)
    bound = 2 * (task.pairs + (task.pairs // 2 if name == "forgetting" else 0))
    for row, asked in zip(tokens, targets != IGNORE, strict=True):
        keys = set(row[:bound:2])
        assert len(keys) == task.pairs and sorted(row[asked]) == sorted(keys)
        assert keys.isdisjoint(row[bound:][~asked[bound:]])
        assert max(keys) < task.vocab // 2 <= min(row[1:bound:2])


def test_zoologys_values_are_distinct_its_filler_holds_keys_and_its_first_keys_are_asked_nearer():
    task, tokens, targets, gaps = samples("zoology", batch=256, length=512)
    asked = targets != IGNORE
    assert all(len(set(row[1:12:2])) == 6 and set(row[:12:2]) == set(row[where]) for row, where in zip(tokens, asked, strict=True))
    assert (tokens[:, 0:12:2] > 0).all() and (tokens[:, 0:12:2] < 32).all() and (tokens[:, 1:12:2] >= 32).all()
    assert any(set(row[:12:2]) & set(row[12:][~where[12:]]) for row, where in zip(tokens, asked, strict=True))
    place = np.zeros((256, 6))
    for row in range(256):
        places = {tokens[row, at]: at for at in np.nonzero(asked[row])[0]}
        place[row] = [places[key] for key in tokens[row, 0:12:2]]
    assert place[:, 0].mean() < place[:, 5].mean()
    assert (gaps[asked] > 0).all() and task.pairs == 6


@pytest.mark.parametrize("name", TRACKING)
def test_a_state_to_track_is_that_of_all_tokens_so_far(name):
    _, tokens, targets, gaps = samples(name, vocab=120, length=32)
    assert (gaps == np.arange(1, 33)).all() and targets.min() >= 0
    for row, answers in zip(tokens, targets, strict=True):
        things, odd, seen = "abcde", 0, {}
        for token, answer in zip(row, answers, strict=True):
            odd ^= int(token)
            left, right = SWAPS[token] if name == "permutations" else (0, 0)
            moved = list(things)
            moved[left], moved[right] = moved[right], moved[left]
            things = "".join(moved)
            if name == "parity":
                assert answer == odd
            else:  # one id for one order
                assert seen.setdefault(things, answer) == answer and list(seen.values()).count(answer) == 1


@pytest.mark.parametrize("name", ["mqar", "forgetting"])
def test_blank_filler_is_one_id_that_is_never_a_key(name):
    task, tokens, targets, _ = samples(name, filler="blank")
    bound = 2 * (task.pairs + (task.pairs // 2 if name == "forgetting" else 0))
    assert (tokens[:, :bound] > 0).all()
    assert ((tokens[:, bound:] > 0) == (targets[:, bound:] != IGNORE)).all()
    for row, place in zip(*np.nonzero(targets != IGNORE), strict=True):
        assert targets[row, place] == answer_of(task, tokens[row], place)


def test_forgetting_binds_half_of_the_keys_again_to_other_values():
    task, tokens, _, _ = samples("forgetting")
    bound = 2 * (task.pairs + task.pairs // 2)
    assert all(len(row[:bound:2]) - len(set(row[:bound:2])) == task.pairs // 2 for row in tokens)


def test_the_power_of_the_gaps_decides_how_near_the_questions_are():
    near, far = (samples("mqar", batch=256, length=512, gap_power=power)[2:] for power in (0.01, 1.0))
    near_gap, far_gap = (gaps[targets != IGNORE].mean() for targets, gaps in (near, far))
    assert far_gap == pytest.approx(256, rel=0.1)  # uniform: half the text
    assert near_gap < far_gap / 2


def test_the_same_generator_gives_the_same_text_and_another_another():
    task = RecallTask()
    first, again, other = (task.sample(8, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"pairs": 20, "length": 64}, "length is 64"),
        ({"vocab": 16}, "vocab is 16"),
        ({"task": "mqra"}, "mqar"),
        ({"gap_power": 0.0}, "gap_power 0.0"),
        ({"filler": "blnk"}, "blank"),
        ({"task": "zoology", "filler": "blank"}, "filler is 'blank' with task 'zoology'"),
        ({"task": "permutations", "vocab": 64}, "vocab is 64: .* 120"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, named):
    with pytest.raises(InputError, match=named):
        RecallTask(**sizes)


def small(vocab_size, **options):
    """One block of GAM."""
    options = {"num_memory_slots": 8, "num_heads": 2, **options}
    return ModelConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, options=(GAMOptions(**options),))


class Reader(torch.nn.Module):
    """Stands in for a model: reads the bindings, and answers only questions at most ``reach`` tokens away."""

    def __init__(self, task, reach):
        super().__init__()
        self.task, self.reach = task, reach
        self.config = ModelConfig(vocab_size=task.vocab)
        self.embed_tokens = torch.nn.Embedding(1, 1)
        self.lm_head = torch.nn.Identity()

    def hidden(self, tokens_BT):
        logits = torch.zeros(*tokens_BT.shape, self.task.vocab)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place, token in enumerate(tokens):
                for key in range(max(0, place - self.reach), place):
                    if key % 2 == 0 and key < 2 * self.task.pairs and tokens[key] == token:
                        logits[row, place, tokens[key + 1]] = 1
        return logits, None


def test_accuracy_counts_right_answers_in_all_and_by_gap():
    task = RecallTask(pairs=4, length=64, vocab=64, gap_power=1.0)
    assert accuracy(Reader(task, 64), task, sequences=32)["accuracy"] == 1.0
    found = accuracy(Reader(task, 31), task, sequences=32)
    for part in found["by_gap"]:
        assert part["accuracy"] == 1.0 if part["gap_from"] < 16 or part["gap_from"] * 2 <= 32 else part["accuracy"] <= 0.1
    total = sum(part["accuracy"] * part["answers"] for part in found["by_gap"])
    assert total / found["answers"] == pytest.approx(found["accuracy"])


def test_a_model_that_knows_nothing_is_at_chance():
    model = LanguageModel(small(64))
    assert accuracy(model, RecallTask(vocab=64), sequences=128)["accuracy"] < 0.15


def answered(model, accuracy, *, pairs=8, length=64, steps=250, slots=64, seed=0, by_gap=(), **more):
    return {
        "model": model, "seed": seed, "task": "mqar", "pairs": pairs, "sequence_length": length, "accuracy": accuracy, "state_bytes": 16 * slots,
        "model_config": {
            "hidden_size": 128, "vocab_size": 512, "max_position_embeddings": max(256, length), "options": {"gam": {"num_memory_slots": slots}},
        },
        "train_config": {"steps": steps, "batch_size": 64, "context": length, "seed": seed}, "by_gap": list(by_gap), **more,
    }  # fmt: skip


def test_a_table_keeps_apart_what_is_no_other_seed():
    near, far = {"gap_from": 2, "answers": 30, "accuracy": 1.0}, {"gap_from": 64, "answers": 10, "accuracy": 0.5}
    rows = [
        answered("gam-mean", 0.9), answered("gam-mean", 0.8, seed=1), answered("gam-mean", 0.5, steps=500), answered("gam-mean", 0.4, gap_power=1.0),
        answered("gam-mean", 0.25, pairs=16, length=512, by_gap=[near, far]), answered("gam-mean", 0.75, pairs=16, length=512, seed=1, by_gap=[near]),
        answered("gam-mean", 0.6, slots=256), answered("mamba", 0.7), answered("mamba", 1.0, filler="blank"),
    ]  # fmt: skip
    machine = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}
    results = {"command": "gam recall --out x", "environment": machine, "corpus": None, "rows": rows}
    table = recall(results)
    assert table.columns[4:] == ["gam-mean (num_memory_slots=64)", "gam-mean (num_memory_slots=256)", "mamba"]
    for row in rows:  # equal parameters ask for another feed-forward width where there are more slots: it goes without saying
        row["model_config"]["intermediate_size"] = 4096 // row["model_config"]["options"]["gam"]["num_memory_slots"]
    assert recall(results).columns == table.columns
    lines = [(*line[:4], line[4].split(" ")[0], line[5], line[6]) for line in table.rows]
    assert lines == [
        ("mqar", "8", "64", "16,000", "85.0", "60.0 % (4 KiB)", "70.0 % (1 KiB)"), ("mqar", "8", "64", "32,000", "50.0", "", ""),
        ("mqar, gaps^1", "8", "64", "16,000", "40.0", "", ""), ("mqar", "16", "512", "16,000", "50.0", "", ""),
        ("mqar, blank filler", "8", "64", "16,000", "", "", "100.0 % (1 KiB)"),
    ]  # fmt: skip
    gaps = recall_by_gap(results).rows
    assert [line[4:6] for line in gaps] == [["2 to 3", "100.0 %"], ["64 to 127", "50.0 %"]]
    against = recall_differences(results).rows
    assert against[0][4] == "best" and against[0][6].startswith("-20.0") and against[1][4] == "best"


def test_its_pictures_are_three_where_gaps_are_known(tmp_path):
    rows = [answered("gam-mean", 0.9), answered("mamba", 0.5, slots=512)]
    results = {"command": "", "environment": {}, "corpus": None, "rows": rows}
    assert [path.name for path in recall_plots(results, tmp_path)] == ["recall.svg", "recall.png", "recall_state.svg", "recall_state.png"]
    rows[0]["by_gap"] = [{"gap_from": 2, "answers": 3, "accuracy": 0.9}]
    assert {path.stem for path in recall_plots(results, tmp_path)} == {"recall", "recall_gap", "recall_state"}
    picture = (tmp_path / "recall_gap.svg").read_text()
    assert "gam-mean" in picture and "mamba" not in picture and "KiB" in (tmp_path / "recall_state.svg").read_text()


def test_a_picture_over_lengths_where_there_are_several(tmp_path):
    elsewhere = {"by_length": [{"length": 512, "accuracy": 0.25, "by_gap": []}]}
    rows = [answered("gam-mean", 0.9, **elsewhere), answered("gam-mean", 0.8, filler="blank", **elsewhere), answered("mamba", 0.5), answered("mamba", 0.4, length=256)]
    results = {"command": "", "environment": {}, "corpus": None, "rows": rows}
    assert {path.stem for path in recall_plots(results, tmp_path)} == {"recall_length", "recall_state"}  # one number of pairs: nothing to draw over it
    picture = (tmp_path / "recall_length.svg").read_text()
    assert all(f">{name}<" in picture for name in ("gam-mean", "gam-mean, blank filler", "mamba, each length trained"))
    results["rows"] = [*rows, answered("mamba", 0.3, pairs=16)]
    assert "recall" in {path.stem for path in recall_plots(results, tmp_path)}
    results["rows"] = [answered("mamba", 0.5, pairs=8), answered("mamba", 0.5, pairs=16, length=128)]
    assert "recall_length" not in {path.stem for path in recall_plots(results, tmp_path)}  # the length goes with the pairs


def test_what_was_learned_is_measured_at_other_lengths_as_well(tmp_path):
    config = small(32, write="none")
    models = [("free", config), ("learned", config.replace(positions="learned", max_position_embeddings=24))]
    task, recipe = RecallTask(pairs=2, length=16, vocab=32, gap_power=1.0), TrainConfig(steps=1, batch_size=2, warmup_steps=0)

    def measure(*lengths):
        results = Results.open(tmp_path / "results.json", command="gam recall", environment={}, corpus=None)
        measure_recall(models, [task], [0], recipe, results, torch.device("cpu"), test_sequences=16, test_lengths=lengths)
        return {row["model"]: row for row in results.rows}

    assert "by_length" not in measure()["free"]
    rows = measure(64, 24)
    assert [part["length"] for part in rows["free"]["by_length"]] == [24, 64]
    assert [part["length"] for part in rows["learned"]["by_length"]] == [24]  # its positions end there
    assert max(part["gap_from"] for part in rows["free"]["by_length"][1]["by_gap"]) == 32
    assert measure(24) == rows  # all there: not trained again
    more = measure(32)["free"]
    assert [part["length"] for part in more["by_length"]] == [24, 32, 64] and more["by_length"][0] == rows["free"]["by_length"][0]
    with pytest.raises(InputError, match="test_lengths holds 7: .* at least 8"):
        measure(7)


def test_every_model_gets_the_same_trials_and_its_seeds_the_best_of_them(tmp_path):
    models = [("one", small(32, write="none")), ("other", small(32, write="mean"))]
    task = RecallTask(pairs=2, length=16, vocab=32)
    recipe = TrainConfig(steps=3, batch_size=4, warmup_steps=0)
    search = Search(space=(Range("learning_rate", 1e-4, 1e-1),), trials=3)

    def measure():
        results = Results.open(tmp_path / "results.json", command="gam recall", environment={}, corpus=None)
        measure_recall(models, [task], [0, 1], recipe, results, torch.device("cpu"), test_sequences=64, search=search)
        return results.rows

    rows = measure()
    trials = {name: [row for row in rows if row["model"] == name and "trial" in row] for name in ("one", "other")}
    assert [row["tuned"] for row in trials["one"]] == [row["tuned"] for row in trials["other"]] and len(trials["one"]) == 3
    for name, tried in trials.items():
        best = max(tried, key=lambda row: (row["accuracy"], -row["curve"][-1]["train_nats"]))
        own = [row for row in rows if row["model"] == name and "trial" not in row]
        assert [row["seed"] for row in own] == [0, 1]
        assert all(row["train_config"]["learning_rate"] == best["tuned"]["learning_rate"] and row["tuned"] == best["tuned"] for row in own)
    machine = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}
    table = recall({"rows": rows, "environment": machine, "corpus": None, "command": ""})
    assert len(table.rows) == 1 and table.columns[4:] == ["one", "other"] and "best of 3 trials" in table.note
    assert measure() == rows


def test_a_training_stops_where_it_has_learned_its_task(tmp_path, monkeypatch):
    """And the trial that learned it in fewer steps is the better one, whatever the others have right."""
    shares, asked = iter([0.2, 0.95, 0.3, 0.4, 0.5, 0.6]), []

    def some(model, task, *, sequences, seed):
        asked.append((sequences, seed))
        return {"accuracy": 1.0 if sequences == 64 else next(shares), "answers": 1, "by_gap": []}

    monkeypatch.setattr("gam_lm.experiments.recall.accuracy", some)
    results = Results.open(tmp_path / "results.json", command="gam recall", environment={}, corpus=None)
    recipe = TrainConfig(steps=120, batch_size=2, warmup_steps=0)
    search = Search(space=(Range("learning_rate", 1e-4, 1e-3),), trials=2)
    models, task = [("one", small(32, write="none"))], RecallTask(pairs=2, length=16, vocab=32)
    measure_recall(models, [task], [0], recipe, results, torch.device("cpu"), test_sequences=64, search=search, stop_at=0.9)
    first, second, row = results.rows
    assert (first["learned_at"], first["curve"][-1]["step"]) == (100, 100) and first["stop_at"] == 0.9
    assert "learned_at" not in second and second["curve"][-1]["step"] == 120
    assert row["tuned"] == first["tuned"] and "learned_at" not in row
    assert asked[:2] == [(256, TUNING_SEQUENCES)] * 2 and asked[2] == (64, TUNING_SEQUENCES) and asked[-1] == (64, TEST_SEQUENCES)
    machine = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}
    tables = recall_table({"rows": results.rows, "environment": machine, "corpus": None, "command": ""})
    assert "| ≤ 240 |" in tables and "| 90 % | not in 120 |" in tables


def test_steps_until_a_task_is_learned_are_those_of_the_seeds_that_did():
    rows = [answered("gam", 1.0, seed=seed, stop_at=0.99, **({"learned_at": at} if at else {})) for seed, at in enumerate((100, 300, None))]
    rows += [answered("mamba", 1.0, stop_at=0.99, learned_at=50)]
    (table,) = recall_steps({"rows": rows})
    assert table.rows[0][4:] == ["99 %", "200 (2 of 3 seeds)", "50"]
    assert recall_steps({"rows": [answered("gam", 1.0)]}) == []


@pytest.mark.parametrize("damage", [{"stop_at": "soon"}, {"stop_at": 99}, {"learned_at": "early"}, {"learned_at": -1}])
def test_a_file_with_no_share_or_step_is_refused(tmp_path, damage):
    content = {"command": "gam recall", "environment": {}, "corpus": None, "rows": [answered("gam", 1.0, **{"stop_at": 0.99, "learned_at": 50} | damage)]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=next(iter(damage))):
        read_results(tmp_path / "results.json")


def test_processes_share_the_rows_and_end_when_all_are_there(tmp_path, monkeypatch):
    import gam_lm.experiments.recall as module

    def open_results():
        return Results.open(tmp_path / "results.json", command="gam recall", environment={}, corpus=None)

    def measure(results):
        measure_recall(models, [RecallTask(pairs=2, length=16, vocab=32)], [0, 1], recipe, results, torch.device("cpu"), test_sequences=16, search=search)

    models = [("one", small(32, write="none")), ("other", small(32, write="mean"))]
    recipe = TrainConfig(steps=1, batch_size=2, warmup_steps=0)
    search = Search(space=(Range("learning_rate", 1e-4, 1e-1),), trials=2)
    mine, waited = open_results(), []
    with claimed(tmp_path, "one mqar P=2 T=16 trial1") as ours:
        assert ours

        def others_finish(seconds):  # until then all that does not wait for this trial is done
            waited.append([(row["model"], row.get("trial"), row["seed"]) for row in mine.rows])
            monkeypatch.setattr(module, "claimed", lambda *_: nullcontext(True))  # the claim is given back

        monkeypatch.setattr(module.time, "sleep", others_finish)
        measure(mine)
    assert set(waited[0]) == {("one", 0, 1000), ("other", 0, 1000), ("other", 1, 1000), ("other", None, 0), ("other", None, 1)} and len(waited) == 1
    rows = mine.rows
    assert len(rows) == 8 and all("accuracy" in row for row in rows)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("there is nothing to wait for"))
    measure(open_results())
    assert open_results().rows == rows


def test_a_row_that_another_process_ends_before_the_claim_is_not_trained_again(tmp_path, monkeypatch):
    import gam_lm.experiments.recall as module

    models, task = [("one", small(32, write="none"))], RecallTask(pairs=2, length=16, vocab=32)
    trained, train = [], module._train

    def measure(claim):
        monkeypatch.setattr(module, "claimed", claim)
        results = Results.open(tmp_path / "results.json", command="gam recall", environment={}, corpus=None)
        recipe = TrainConfig(steps=1, batch_size=2, warmup_steps=0)
        measure_recall(models, [task], [0], recipe, results, torch.device("cpu"), test_sequences=16)

    def after_another(*_):
        measure(claimed)
        return nullcontext(True)

    monkeypatch.setattr(module, "_train", lambda *a: (trained.append(1), train(*a))[1])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    measure(after_another)
    assert len(trained) == 1


@pytest.mark.slow
def test_workers_train_the_rows_of_one_process(tmp_path):
    flags = ["recall", "--models", "gam-static", "gam", "--pairs", "2", "--length", "16", "--vocab-size", "32", "--hidden-size", "32", "--gam.num-memory-slots", "32"]
    flags += ["--gam.num-heads", "2", "--steps", "3", "--batch-size", "4", "--trials", "2", "--seeds", "0", "1", "--stop-at", "0.99"]
    found = {}
    for count in ("1", "2"):
        done = subprocess.run([sys.executable, "-m", "gam_lm", *flags, "--workers", count, "--out", tmp_path / count], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / count / "results.json").read_text())["rows"]
        found[count] = {(row["model"], row["seed"], row.get("trial")): (row["accuracy"], row["curve"]) for row in rows}
    assert len(found["1"]) == 8 and found["1"] == found["2"]


def test_a_length_that_does_not_fit_costs_no_row(tmp_path, monkeypatch):
    def until_96(model, task, **options):
        if task.length == 96:
            raise MemoryError
        return accuracy(model, task, **options)

    def measure(*lengths):
        results = Results.open(tmp_path / "results.json", command="gam recall", environment={}, corpus=None)
        measure_recall(models, [RecallTask(pairs=2, length=16, vocab=32)], [0], recipe, results, torch.device("cpu"), test_sequences=16, test_lengths=lengths)

    def measured():
        (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
        return [part["length"] for part in row.get("by_length", ())]

    models = [("gam-mean", small(32, write="mean"))]
    recipe = TrainConfig(steps=1, batch_size=2, context=16, warmup_steps=1, precision="fp32")
    monkeypatch.setattr("gam_lm.experiments.recall.accuracy", until_96)
    with pytest.raises(MemoryError):
        measure(96)
    assert measured() == []
    with pytest.raises(MemoryError):
        measure(24, 64, 96, 128)
    assert measured() == [24, 64]
    with pytest.raises(MemoryError):
        measure(32, 96)
    assert measured() == [24, 32, 64]


def test_many_slots_go_through_in_more_parts(monkeypatch):
    task = RecallTask(pairs=2, length=16, vocab=32)
    model, seen = LanguageModel(small(32, write="mean", num_memory_slots=64)), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens: (seen.append(len(tokens)), hidden(tokens))[1])
    whole = accuracy(model, task, sequences=8)
    monkeypatch.setattr("gam_lm.experiments.recall_accuracy.MODEL_NUMBERS", 3.5 * 16 * activations_per_token(model.config, 16))
    assert accuracy(model, task, sequences=8) == whole and seen == [8, 3, 3, 2]


def test_other_lengths_stand_beside_that_of_the_training():
    tested = {"by_length": [{"length": 512, "accuracy": 0.5, "answers": 8, "by_gap": []}]}
    rows = [answered("gam-mean", 0.9, **tested), answered("gam-mean", 0.7, seed=1, **tested), answered("mamba", 0.4)]
    machine = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}
    results = {"command": "gam recall --out x", "environment": machine, "corpus": None, "rows": rows}
    (table,) = recall_by_length(results)
    assert [line[4:] for line in table.rows] == [["64", "80.0 %", ""], ["512", "50.0 %", ""]]
    assert "Tested at" in recall_table(results)
    assert recall_by_length(results | {"rows": rows[2:]}) == [] and "Tested at" not in recall_table(results | {"rows": rows[2:]})


@pytest.mark.slow
def test_the_verb_teaches_a_written_memory_what_a_static_one_cannot_learn(tmp_path, capsys):
    flags = ["--models", "gam-static", "gam-mean", "--pairs", "2", "--length", "16", "--vocab-size", "32", "--out", str(tmp_path)]
    flags += ["--hidden-size", "32", "--gam.num-memory-slots", "32", "--gam.num-heads", "2", "--steps", "120", "--batch-size", "32"]
    assert run(["recall", *flags]) == 0
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["gam-mean"]["accuracy"] > 0.9 > 0.5 > rows["gam-static"]["accuracy"]
    assert rows["gam-mean"]["parameters"] == pytest.approx(rows["gam-static"]["parameters"], rel=0.02)
    assert (tmp_path / "recall.svg").is_file() and "gam-mean" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert run(["recall", *flags]) == 0  # nothing is trained twice
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [rows["gam-static"], rows["gam-mean"]]
