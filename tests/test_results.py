"""results.json, statistics, tables and plots."""

import json
import math
import multiprocessing
import re
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from gam_lm.cli.main import parse
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.attention_options import AttentionOptions
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.presets.models import BASELINE, MODELS, named_model
from gam_lm.presets.setups import ABLATIONS, PRESETS, preset
from gam_lm.report.plots import colour
from gam_lm.report.rows import by_variant, machine_line
from gam_lm.report.statistics import paired, paired_seeds, shown, summarise, t_distribution, t_quantile
from gam_lm.report.tables import quality_table
from gam_lm.results import Results, fields_set, read_blocks, read_documents, read_results, write_blocks
from gam_lm.training.recipe import TrainConfig

CORPUS = {"name": "novels", "sha256": "ab" * 32, "tokens": 1000, "bytes": 4000, "tokenizer": "bpe"}
MACHINE = {"device": "cpu", "processor": "x", "cores": 2, "memory_gb": 8, "python": "3.11", "torch": "2.9", "commit": None, "dirty": None}


def row(model="gam-static", seed=0, nats=5.0, **more):
    curve = [{"step": s, "tokens": s * 100, "seconds": 1.0 * s, "train_nats": nats + 1, "val_nats": nats + 1 / s} for s in (1, 2, 4)]
    return {
        "model": model, "seed": seed, "backend": "torch", "model_config": {"hidden_size": 8}, "train_config": {"steps": 4, "seed": seed},
        "parameters": 1234, "train_tokens": 400, "val_nats_per_token": nats, "val_ppl": math.exp(nats), "val_bits_per_byte": 1.5,
        "tokens_per_second": 100.0, "epoch_seconds": 10.0, "state_bytes": 64, "curve": curve,
    } | more  # fmt: skip


FLOOR = {"model": "unigram", "floor": True, "val_nats_per_token": 6.5, "val_ppl": math.exp(6.5), "val_bits_per_byte": 2.5, "val_word_ppl": 900.0}


def opened(path, corpus=CORPUS, machine=MACHINE):
    return Results.open(path, command="gam bench", environment=machine, corpus=corpus)


def test_a_file_that_another_process_began_meanwhile_keeps_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    other = opened(path)
    other.add(row())
    exists, asked = Path.exists, []

    def late(self):
        asked.append(self)
        return len([each for each in asked if each == path]) > 1 and exists(self)  # not yet there when it was looked for first

    monkeypatch.setattr(Path, "exists", late)
    assert len(opened(path).rows) == 1


def test_a_row_is_on_the_disk_at_once_and_found_again(tmp_path):
    results = opened(tmp_path / "results.json")
    results.add(row())
    assert read_results(tmp_path / "results.json")["rows"] == [row()]
    again = opened(tmp_path / "results.json")
    assert again.find(row(nats=1.0)) == row() and again.find(row(seed=1)) is None and again.find(row(model_config={"hidden_size": 9})) is None
    again.add(row(nats=4.0))
    assert again.rows == [row(nats=4.0)]


def test_figures_are_added_to_a_row_and_nothing_else_changes(tmp_path):
    opened(tmp_path / "results.json").add(row())
    results = opened(tmp_path / "results.json", machine=MACHINE | {"cores": 4})
    results.add(row(seed=1))
    elsewhere = {"environment": MACHINE | {"cores": 4}}
    results.amend(row(), {"step_ms": 3.5})
    assert read_results(tmp_path / "results.json")["rows"] == [row(step_ms=3.5), row(seed=1, **elsewhere)]
    with pytest.raises(KeyError):
        results.amend(row(seed=2), {"step_ms": 1.0})
    with pytest.raises(ValueError, match="step_ms"):
        results.amend(row(), {"step_ms": float("nan")})


def test_how_often_a_run_is_saved_does_not_tell_a_row_from_another(tmp_path):
    results = opened(tmp_path / "results.json")
    results.add(row(train_config={"steps": 4, "seed": 0, "checkpoint_every": 50}))
    assert results.find(row()) is not None and results.find(row(train_config={"steps": 5, "seed": 0})) is None


def _add(path, seed):
    opened(path).add(row(seed=seed))


def test_two_processes_lose_no_row(tmp_path):
    path = tmp_path / "results.json"
    opened(path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_add, [(path, seed) for seed in range(12)])
    assert sorted(r["seed"] for r in read_results(path)["rows"]) == list(range(12))


def test_a_row_of_another_machine_says_so(tmp_path):
    opened(tmp_path / "results.json").add(row())
    opened(tmp_path / "results.json", machine=MACHINE | {"cores": 64}).add(row(seed=1))
    first, second = read_results(tmp_path / "results.json")["rows"]
    assert "environment" not in first and second["environment"]["cores"] == 64


def test_results_of_another_corpus_are_refused_and_left_alone(tmp_path):
    opened(tmp_path / "results.json").add(row())
    with pytest.raises(InputError, match="another corpus"):
        opened(tmp_path / "results.json", corpus=CORPUS | {"tokens": 5})
    assert len(read_results(tmp_path / "results.json")["rows"]) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="results.json"):
        opened(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == content


def test_a_figure_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="val_ppl is inf"):
        opened(tmp_path / "results.json").add(row(val_ppl=math.inf))


def test_losses_by_block_come_back(tmp_path):
    nats, tokens = np.array([1.5, 2.5]), np.array([4, 3])
    name = write_blocks(tmp_path, "gam-seed0", nats, tokens)
    for ours, theirs in zip(read_blocks(tmp_path, {"val_blocks": name}), (nats, tokens), strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert read_documents(tmp_path, {"val_blocks": name}) is None
    told = {"test_blocks": write_blocks(tmp_path, "gam-seed0-test", nats, tokens, np.array([7, 9]))}
    assert read_documents(tmp_path, told, "test").tolist() == [7, 9] and read_blocks(tmp_path, told, "test")[1].tolist() == [4, 3]
    with pytest.raises(InputError, match="blocks/"):
        read_blocks(tmp_path, {"model": "x", "val_blocks": "blocks/none.npy"})


# 97.5 % quantiles of Student's t as every table has them.
@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (10, 2.22814), (30, 2.04227)]
)
def test_students_t_is_the_tabulated_one(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)
    assert t_distribution(0.0, freedom) == 0.5
    assert t_distribution(-1.3, freedom) == pytest.approx(1 - t_distribution(1.3, freedom))


def test_an_interval_needs_two_values():
    assert summarise([3.0]).half_width == math.inf
    summary = summarise([1.0, 2.0, 3.0])
    assert (summary.mean, summary.deviation) == (2.0, 1.0) and summary.half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)


def test_a_difference_within_the_noise_is_not_shown():
    assert not shown(paired([1.0, 2.0], [1.1, 1.9])) and not shown(paired([1.0], [2.0])) and not shown(paired_seeds([1.0], [2.0]))
    assert shown(paired([1.0, 2.0, 3.0], [1.5, 2.5, 3.5001])) and shown(paired_seeds([1.0, 2.0, 3.0], [1.5, 2.5, 3.5001]))


def test_the_quality_table_has_a_line_per_model_and_the_floors_below():
    results = {"corpus": CORPUS, "environment": MACHINE, "rows": [FLOOR, row(), row(seed=1, nats=5.2), row(model="mamba", nats=4.9)]}
    lines = quality_table(results).splitlines()
    assert lines[0].startswith("| Model | Parameters | s/epoch | Val loss (nats) | PPL |")
    assert lines[2].startswith("| gam-static | 1,234 | 10 | 5.1000 ± 1.2706 |") and lines[2].endswith("| 2 |")
    assert lines[3].startswith("| mamba | 1,234 | 10 | 4.9000 | 134.29 |")
    assert lines[4].startswith("| *unigram counts* |")
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_loss_curves_are_drawn_twice_to_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    from gam_lm.report.plots import loss_curves

    results = {"corpus": CORPUS, "environment": MACHINE, "rows": [FLOOR, row(), row(seed=1, nats=5.2), row(model="mamba", nats=4.9)]}
    first = [path.read_bytes() for path in loss_curves(results, tmp_path / "curves")]
    second = [path.read_bytes() for path in loss_curves(results, tmp_path / "curves")]
    assert first == second
    svg = first[0].decode()
    assert all(name in svg for name in ("gam-static", "mamba", "unigram counts", "nats per token"))
    assert first[1].startswith(b"\x89PNG")
    results["rows"][0] = FLOOR | {"val_nats_per_token": 50.0}
    assert "unigram counts" not in loss_curves(results, tmp_path / "far")[0].read_text()  # it would press the curves together


def test_the_environment_names_the_machine():
    from gam_lm.runtime.measure import environment

    found = environment()
    assert set(found) == set(MACHINE) and found["cores"] >= 1 and json.dumps(found)


RESULTS = Path(__file__).parent.parent / "results"
NO_FIGURES = {"model_config", "train_config", "environment", "transformers_config"}  # what a row was measured with


def figures(value):
    """Every number within a row, in the order of its keys."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value.keys() - NO_FIGURES):
            yield from figures(value[key])
    elif isinstance(value, list):
        for each in value:
            yield from figures(each)


def digest(content):
    found = [repr(each) for row in content["rows"] for each in figures({key: value for key, value in row.items() if key != "changes"})]
    return {"figures": len(found), "sha256": sha256("".join(f"{each}\n" for each in found).encode()).hexdigest(), "rows": len(content["rows"])}


DIGESTS = json.loads((RESULTS / "digest.json").read_text())


@pytest.mark.parametrize(("folder", "known"), DIGESTS.items())
def test_no_committed_figure_has_changed(folder, known):
    """A folder that gains rows gets a new digest with them; one that was measured anew is another folder."""
    assert digest(read_results(RESULTS / folder / "results.json")) == known


COMMITTED = [RESULTS / folder / "results.json" for folder in DIGESTS]


def test_every_committed_row_has_a_configuration_of_today_and_a_name_that_commands_take():
    rows = [(path.parent, row) for path in COMMITTED for row in read_results(path)["rows"] if "model_config" in row]
    for folder, row in rows:
        config = ModelConfig.from_dict(row["model_config"])
        assert config.to_dict() == row["model_config"]
        name = re.sub(r"(-fan-in|-300-steps|-tinystories)?(-seed\d)?$", "", row["model"]) if "split" in row else row["model"]  # evaluations name run directories
        if name in ABLATIONS:
            name = "gam-static+gate_activation=sigmoid+positions=learned+" + "+".join(f"{key}={value}" for key, value in row["changes"].items())
        if name.startswith(BASELINE):
            continue
        named, sizes = named_model(name, {"vocab_size": 9}), ("num_heads", "num_memory_slots", "conv_kernel_size", "expand")
        assert named.mixers == config.mixers and named.positions == config.positions and named.stack == config.stack, (folder, row["model"])
        (ours,), (theirs,) = named.options, config.options
        assert {**ours.to_dict(), **{key: None for key in sizes}} == {**theirs.to_dict(), **{key: None for key in sizes}}, (folder, row["model"])


RATES_BEFORE_MUON = {None: 1e-3, "laptop": 8e-3, "small-cpu": 8e-3}
"""By preset: the learning rate of commands without one, before Muon was the default."""


def usual_rate(verb):
    chosen = getattr(verb, "preset", None)
    return preset(chosen).train.learning_rate if chosen in PRESETS else TrainConfig().learning_rate


def test_every_committed_command_is_understood_and_names_the_rows_that_it_made():
    for path in COMMITTED:
        content = read_results(path)
        if content["command"].startswith("gam eval"):
            continue  # context use was measured in another way then, by flags that are gone
        program, *arguments = shlex.split(content["command"])
        if program == "python":
            assert (Path(__file__).parent.parent / arguments[0]).is_file(), path
            continue
        (verb,) = parse(arguments)
        models = {row["model"] for row in content["rows"]}
        assert set(getattr(verb, "models", ())) <= models, path
        searched = arguments[0] == "tune" or getattr(verb, "tuned", None) is not None  # whose rates are in the rows alone
        recipes = [row["train_config"] for row in content["rows"] if "train_config" in row]
        if hasattr(verb, "recipe") and not searched and "learning_rate" in getattr(verb, "given", {"learning_rate"}):  # `gam train` plans what is not given
            rate = verb.recipe.learning_rate
            if rate == usual_rate(verb) and any(each.get("optimizer", "adamw") == "adamw" for each in recipes):
                rate = RATES_BEFORE_MUON.get(getattr(verb, "preset", None), rate)
            assert any(each["learning_rate"] == rate for each in recipes), path


def test_the_losses_by_block_of_every_committed_row_are_there_and_no_others():
    for path in COMMITTED:
        named = {row[key] for row in read_results(path)["rows"] for key in ("val_blocks", "test_blocks") if key in row}
        assert named == {f"blocks/{each.name}" for each in (path.parent / "blocks").glob("*.npy")}


def options_row(**options):
    return row(model="gam", model_config=ModelConfig(vocab_size=9, hidden_size=16, options=(GAMOptions(**options),)).to_dict())


def test_the_options_of_a_mixer_tell_rows_apart_and_what_follows_from_others_does_not(tmp_path):
    assert fields_set(options_row(), "model_config") == {"vocab_size": 9, "hidden_size": 16}
    assert fields_set(options_row(write="mean"), "model_config") == {"vocab_size": 9, "hidden_size": 16, "write": "mean"}  # its addresses follow
    assert fields_set(options_row(write_address="slots", num_heads=2), "model_config").items() >= {"write_address": "slots", "num_heads": 2}.items()
    results = opened(tmp_path / "results.json")
    results.add(options_row())
    assert results.find(options_row()) and results.find(options_row(num_heads=4)) and not results.find(options_row(num_heads=2))
    older = options_row()
    del older["model_config"]["options"]["gam"]["max_write"]
    assert results.find(older) is not None


def test_options_of_several_mixers_are_said_with_the_mixer_s_name():
    config = ModelConfig(vocab_size=9, hidden_size=16, mixers=("gam", "attention"), options=(AttentionOptions(window=5),))
    assert fields_set(row(model_config=config.to_dict()), "model_config") == {
        "vocab_size": 9, "hidden_size": 16, "mixers": ["gam", "attention"], "attention.window": 5,
    }  # fmt: skip
    unknown = {"vocab_size": 9, "hidden_size": 16, "mixers": ["elsewhere"], "options": {"elsewhere": {"taps": 3}}}
    assert fields_set(row(model_config=unknown), "model_config")["taps"] == 3


def test_rows_of_one_name_are_told_apart_by_the_option_that_differs():
    rows = [options_row(), options_row(num_memory_slots=8) | {"seed": 1}]
    assert list(by_variant(rows)) == ["gam", "gam (num_memory_slots=8)"]


def test_a_note_of_a_row_stands_below_every_table():
    noted = row(model="mamba", note="A_log decayed")
    results = {"corpus": CORPUS, "environment": MACHINE, "rows": [row(), noted, noted | {"seed": 1}]}
    assert quality_table(results).rstrip().endswith("Python 3.11. mamba: A_log decayed.")
    assert "A_log" not in quality_table(results | {"rows": [row()]})
    assert machine_line(results).endswith("torch 2.9. mamba: A_log decayed.")


def test_a_model_has_one_colour_whatever_follows_its_name():
    assert len({colour(name) for name in MODELS}) == len(MODELS)
    for name in MODELS:
        assert colour(name) == colour(f"{name}+conv_kernel_size=5") == colour(f"{name} (num_heads=2)") == colour(f"{name}-seed1")
    others = ["hf:llama", "hf:gpt2", "moving_average"]
    assert [colour(name) for name in others] == [colour(name) for name in others]
    assert {colour(name) for name in others}.isdisjoint({colour(name) for name in MODELS})


def test_tables_and_pictures_need_no_torch():
    code = "import sys, gam_lm.report.page, gam_lm.report.plots, gam_lm.report.gpu, gam_lm.report.trace_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_markdown_reads_nothing_of_a_file_as_markup(tmp_path):
    from gam_lm.report.page import report_markdown

    evil = "gam\n\n# Heading\n<script>alert(1)</script> | x"
    rows = [row(evil, note="a\n\n<img src=x>"), row("llama")]
    content = {"command": "gam bench\n```\n# Heading\n", "environment": MACHINE | {"processor": "x\n# Heading"}, "corpus": CORPUS | {"name": "n\n# Heading <b>"}, "rows": rows}
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    page = report_markdown([folder / "results.json"])
    outside = re.sub(r"(`{3,})sh\n.*?\n\1\n", "", page, flags=re.S)  # the command stands in a fence that is longer than its own
    assert not re.search("^# Heading", outside, flags=re.M) and "<script" not in page and "<img" not in page and "<b>" not in page
    assert r"gam # Heading &lt;script>alert(1)&lt;/script> \| x" in page


def damaged_copies(content):
    """The content with one value after the other missing or of another type."""
    def walk(value, way=()):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield (*way, key)
            yield from walk(inner, (*way, key))

    for way in walk(content):
        for new in (None, "x", [], {}, -1, "missing"):
            copy = json.loads(json.dumps(content))
            *before, last = way
            holder = copy
            for key in before:
                holder = holder[key]
            if new == "missing":
                del holder[last]
            else:
                holder[last] = new
            yield copy


def test_report_and_compare_say_in_one_line_what_is_wrong_with_a_damaged_file(tmp_path):
    from gam_lm.report.page import report_markdown
    from gam_lm.report.verdict import compare

    path, tried, refused = tmp_path / "results.json", 0, 0
    rows = [FLOOR, row("gam", 0, context_use={"context": 8, "targets": 4, "by_distance": {"4": None}}), row("llama", 0, val_blocks="blocks/a.npy")]
    for copy in damaged_copies({"command": "gam bench", "environment": MACHINE, "corpus": CORPUS, "rows": rows, "primary": [["gam", "llama"]], "margin": 0.02}):
        path.write_text(json.dumps(copy))
        for work in (lambda: report_markdown([path]), lambda: compare([str(path)]).paragraph()):
            tried += 1
            try:
                assert work()
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
    assert tried > 1000 and 0.3 * tried < refused < tried


@pytest.mark.parametrize("damage", ["cut", "shape", "type", "nan", "text", "pickle", "folder", "longer"])
def test_a_damaged_file_of_blocks_is_named_in_one_line(damage, tmp_path):
    name = write_blocks(tmp_path, "gam", np.array([5.0, 6.0]), np.array([2.0, 2.0]), np.array([0, 1]))
    path, wrong = tmp_path / name, {"shape": np.ones((5, 2), np.float32), "type": np.ones((2, 2)), "nan": np.full((2, 2), np.nan, np.float32), "pickle": np.array([{}])}
    if damage in wrong:
        np.save(path, wrong[damage], allow_pickle=True)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-3], "text": b"hello", "longer": path.read_bytes() + b"x"}[damage])
    with pytest.raises(InputError, match=re.escape(path.name)) as raised:
        read_blocks(tmp_path, {"model": "gam", "val_blocks": name})
    assert "\n" not in str(raised.value)
