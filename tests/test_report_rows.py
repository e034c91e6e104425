"""What a report keeps apart, what it leaves out, and what it says of that."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from gam_lm.config import ModelConfig
from gam_lm.diagnostics.context_use import context_use
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.report.ablation import ablation
from gam_lm.report.decode import decoding
from gam_lm.report.plots import loss_curves
from gam_lm.report.recall import recall, recall_differences
from gam_lm.report.scaling import exponent_text, fit_exponent, scaling
from gam_lm.report.sections import KINDS, kind_of
from gam_lm.report.speed import speed_plot
from gam_lm.report.tables import quality
from gam_lm.results import Results, read_results
from gam_lm.training.recipe import TrainConfig

MACHINE = {"device": "cpu", "processor": "Laptop A", "cores": 2, "torch": "2", "python": "3"}
SERVER = MACHINE | {"processor": "Server B", "cores": 64}
CORPUS = {"name": "novels", "sha256": "ab" * 32, "tokens": 1000, "tokenizer": "bpe"}


def results_of(*rows):
    return {"rows": list(rows), "environment": MACHINE, "corpus": CORPUS}


def config(width=64):
    return ModelConfig(vocab_size=64, hidden_size=width).to_dict()


def timed(width, length, ms, **columns):
    """A row of scale and of decoding at once."""
    return {
        "model": "gam", "backend": "torch", "model_config": config(width), "sequence_length": length, "context": length, "batch_size": 1, "dtype": "fp32",
        "variant": "eager", "outcome": "ok", "parameters": width * width, "forward_ms": ms, "forward_backward_ms": ms, "peak_memory_mb": ms, "step_ms": ms,
        "share_of_bandwidth": 0.1, "bandwidth": 1e9, "state_bytes": width * 1024, **columns,
    }  # fmt: skip


def trained(model, seed, nats, **columns):
    row = {"model": model, "seed": seed, "backend": "torch", "model_config": config(), "train_config": TrainConfig(seed=seed, steps=2).to_dict(), "parameters": 1}
    if nats is None:
        return row | {"diverged": True} | columns
    curve = [{"step": step, "tokens": 100 * step, "val_nats": nats + 1 / step} for step in (1, 2)]
    return row | {"val_nats_per_token": nats, "val_ppl": 9.0, "train_tokens": 100, "curve": curve} | columns


def test_two_widths_of_a_model_are_two_models_in_times():
    rows = [timed(64, T, T / 1000) for T in (1024, 2048, 4096)] + [timed(128, T, T / 100) for T in (2048, 4096)]
    lengths, _, exponents = scaling(results_of(*rows))
    assert [each for each in lengths.columns if "time" in each] == ["gam (hidden_size=64) time (ms)", "gam (hidden_size=128) time (ms)"]
    assert [row[2] for row in exponents.rows] == ["1.00 ± 0.00", "1.00"]
    (table,) = decoding(results_of(*rows))
    assert [row[0] for row in table.rows] == ["gam (hidden_size=64)", "gam (hidden_size=128)"] and table.rows[0][5] == "4.00"
    assert fit_exponent([1024, 1024], [1.0, 2.0]) is None and exponent_text([timed(64, 1024, 1.0)] * 2, "forward_ms") == ""


def test_rows_of_another_machine_are_named_below_the_table():
    (table,) = decoding(results_of(timed(64, 1000, 1.0), timed(64, 2000, 1.0, environment=SERVER | {"commit": "abc"})))
    assert "cpu, Laptop A, 2 cores, torch 2. Measured on cpu, Server B, 64 cores, torch 2: gam (length 2000, context 2000)." in table.note
    same = quality(results_of(trained("gam", 0, 4.0), trained("gam", 1, 4.0, environment=MACHINE | {"commit": "abc"}, train_tokens=200))).note
    assert "Measured on" not in same and "100 or 200 tokens trained" in same
    assert "Server B, 64 cores, torch 2: gam (seed 1)." in quality(results_of(trained("gam", 0, 4.0), trained("gam", 1, 4.0, environment=SERVER))).note


def test_a_seed_that_diverged_takes_no_line_from_the_curves(tmp_path):
    loss_curves(results_of(trained("gam", 0, 4.0), trained("gam", 1, None), trained("mamba", 0, 4.2)), tmp_path / "curves")
    assert ">gam<" in (tmp_path / "curves.svg").read_text()


def test_a_row_of_an_ablation_that_diverged_is_shown_as_such():
    more = {"changes": {}, "paper_size_parameters": 5}
    table = ablation(results_of(trained("full", 0, 4.0, **more), trained("full", 1, None, **more), trained("sum", 0, None, **more)))
    assert [row[3] for row in table.rows] == ["4.0000", "diverged"] and table.rows[0][7] == "2 (1 diverged)"


def test_a_study_is_a_kind_of_its_own_with_or_without_pruned_trials(tmp_path):
    tuned = [trained("gam", 1000, 4.0, trial=0, tuned={"learning_rate": 1e-3}), trained("gam", 1000, 4.1, trial=1, tuned={"learning_rate": 2e-3})]
    pruned = {key: value for key, value in trained("gam", 1000, None, trial=2, tuned={"learning_rate": 4e-3}).items() if key not in ("diverged", "parameters")}
    study = results_of(*tuned, pruned | {"pruned": True})
    assert kind_of(study) == "study"
    (table,) = KINDS["study"].tables(study, tmp_path)
    assert table.rows[0][:2] == ["gam", "3 (1 pruned)"]
    assert len(KINDS["study"].pictures(study, tmp_path, tmp_path)) == 2 and quality(study).rows


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_plot_of_speed_takes_any_number_of_variants(tmp_path, count):
    rows = [timed(64, 256, 1.0, variant=f"step {i}", tokens_per_second=100.0, flops_per_second=1.0) for i in range(count)]
    assert len(speed_plot(results_of(*rows), tmp_path / "speed")) == 2


def test_every_command_that_added_a_row_is_kept(tmp_path):
    def add(command, model):
        opened = Results.open(tmp_path / "results.json", command=command, environment=MACHINE, corpus=None)
        opened.add({"model": model, "outcome": "ok"})
        return read_results(tmp_path / "results.json")

    assert "commands" not in add("gam one", "gam") and "commands" not in add("gam one", "llama")
    assert add("gam two", "mamba")["commands"] == ["gam one", "gam two"]
    content = add("gam one", "gam")
    assert content["commands"] == ["gam two", "gam one"] and content["command"] == "gam one" and list(content)[-1] == "rows"


def test_rows_of_two_writers_are_kept_where_the_system_has_no_fcntl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)

    def write(name):
        opened = Results.open(tmp_path / "results.json", command="gam", environment=MACHINE, corpus=None)
        for i in range(15):
            opened.add({"model": name, "seed": i})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("gam", "llama")))
    assert len(read_results(tmp_path / "results.json")["rows"]) == 30


def test_context_use_wants_two_targets():
    with pytest.raises(InputError, match="targets is 1: use at least 2"):
        context_use(LanguageModel(ModelConfig(vocab_size=64, hidden_size=8)), None, None, [4], targets=1)


USUAL_RATE = TrainConfig().learning_rate


def answered(model, seed, share, rate=USUAL_RATE, **columns):
    recipe = TrainConfig(seed=seed, steps=2, learning_rate=rate).to_dict()
    return {
        "model": model, "seed": seed, "backend": "torch", "task": "mqar", "pairs": 8, "sequence_length": 64, "vocab": 64, "gap_power": 0.01, "model_config": config(),
        "train_config": recipe, "accuracy": share, "state_bytes": 1024, "parameters": 1, **columns,
    }  # fmt: skip


def test_recall_shows_the_values_of_the_best_trial_alone():
    def best(rate, share, trial, shares):
        tuned = {"learning_rate": rate}
        return [answered("gam", 1000, share, rate, variant=f"trial{trial}", trial=trial, tuned=tuned), *(
            answered("gam", seed, each, rate, tuned=tuned) for seed, each in enumerate(shares)
        )]  # fmt: skip

    untuned = [answered("gam", 0, 0.2), answered("gam", 1, 0.22)]
    (line,) = recall(results_of(*untuned, *best(1e-2, 0.8, 0, [0.5, 0.51]), *best(2e-2, 0.9, 1, [0.98, 0.99]))).rows
    assert line[-1].startswith("98.5 % ± 6.4")
    table = recall(results_of(*untuned, answered("gam", 0, 0.9, 1e-2)))  # none is tuned: another learning rate is another model
    assert table.columns[-2:] == ["gam", "gam (learning_rate=0.01)"]


def test_differences_of_recall_carry_holms_correction_over_all_pairs_of_a_line():
    shares = {"gam": (0.9, 0.92, 0.91), "llama": (0.8, 0.79, 0.82), "mamba": (0.5, 0.55, 0.52)}
    rows = [answered(name, seed, share) for name, each in shares.items() for seed, share in enumerate(each)]
    widths = {}
    for names in (("gam", "mamba"), tuple(shares)):
        table = recall_differences(results_of(*(row for row in rows if row["model"] in names)))
        widths[len(names)] = float(table.rows[0][table.columns.index("mamba")].split("± ")[1].split(":")[0])
    assert widths[3] > 1.3 * widths[2]
