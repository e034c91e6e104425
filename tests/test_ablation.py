"""Table 3: the rows, their sizes, and what is said of their differences."""

import json

import numpy as np
import pytest

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.experiments.ablation import changes_of_row, plan_ablation
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.presets.models import changed, named_model
from gam_lm.presets.setups import ABLATION, ABLATIONS
from gam_lm.report.ablation import ablation, above_full
from gam_lm.report.published import TABLE_3
from gam_lm.training.recipe import TrainConfig

FULL = ModelConfig(
    vocab_size=31, hidden_size=8, num_hidden_layers=2, positions="learned", initialization="scaled",
    options=(GAMOptions(write="none", gate_activation="sigmoid", num_heads=2, num_memory_slots=6),),
)  # fmt: skip
TINY = ["--hidden-size", "8", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--gam.num-memory-slots", "4", "--vocab-size", "270",
        "--context", "16", "--batch-size", "2", "--steps", "2", "--precision", "fp32", "--device", "cpu"]  # fmt: skip


def test_the_published_rows_have_the_published_parameter_counts():
    rows = plan_ablation(["published"], [0], FULL, TrainConfig(steps=1))
    assert {row.name: row.columns["paper_size_parameters"] for row in rows} == {name: line.parameters for name, line in TABLE_3.items()}


def test_a_kept_gate_is_what_the_published_single_paths_lack():
    rows = {row.name: row for row in plan_ablation(["published", "gated"], [0], FULL, TrainConfig(steps=1))}
    for path in ("global", "local"):
        gate = rows[f"{path}-gated"].columns["paper_size_parameters"] - rows[path].columns["paper_size_parameters"]
        assert gate == 6 * (512 * 512 + 512)
        assert rows[f"{path}-gated"].config == changed(rows[path].config, {"keep_gate": True})


def field_of(config, field):
    """A field of the model, or of its one mixer."""
    return getattr(config, field, None) or getattr(config.options[0], field)


def test_every_row_differs_from_the_full_model_in_what_its_name_says():
    rows = plan_ablation(["full", "library"], [3, 4], FULL, TrainConfig(steps=1))
    assert [row.recipe.seed for row in rows] == sorted(row.recipe.seed for row in rows) and {row.recipe.seed for row in rows} == {3, 4}
    names = [row.name for row in rows]
    assert "initialization=paper" in names and "initialization=scaled" not in names and "positions=learned" not in names  # the full model has them
    for row in rows:
        if row.name != "full":
            field, value = row.name.split("=")
            assert str(field_of(row.config, field)) == value and changed(row.config, {field: field_of(FULL, field)}) == FULL
    assert len({row.label for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("gloabl", "did you mean 'global'"), ("kernel=3", "unknown field of gam"), ("write=detla", "did you mean 'delta'"),
        ("conv_kernel_size=many", "conv_kernel_size is 'many'"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_is_named(row, said):
    with pytest.raises(InputError, match=said):
        plan_ablation([row], [0], FULL, TrainConfig(steps=1))


def test_only_a_gated_model_is_taken_apart():
    with pytest.raises(InputError, match="unknown field of attention 'fusion'"):
        plan_ablation(["full"], [0], FULL.replace(mixers=("attention",)), TrainConfig(steps=1))
    with pytest.raises(InputError, match="row 'full' is the model with fusion=gate, which yours has not"):
        plan_ablation(["full"], [0], changed(FULL, {"fusion": "sum"}), TrainConfig(steps=1))


def test_every_preset_names_rows_that_exist():
    for preset in ABLATION.values():
        full = named_model(preset.full, {"vocab_size": preset.vocab_size, **preset.model})
        assert plan_ablation(preset.models, preset.seeds, full, preset.train)
    assert all(changes_of_row(name) == dict(changes) for name, changes in ABLATIONS.items())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(" ".join(rng.choice(["alpha", "beta", "gamma"], 9)) + "\n" for _ in range(300)))
    return path


def test_an_ablation_goes_on_where_it_stopped_and_holds_both_initialisations(text, tmp_path, capsys):
    out = tmp_path / "ablation"
    command = ["ablate", "--data", str(text), "--out", str(out), *TINY]
    assert run([*command, "--rows", "published", "--seeds", "0", "1"]) == 0
    before = json.loads((out / "results.json").read_text())["rows"]
    assert run([*command, "--rows", "full", "local", "local-gated", "--seeds", "0", "--initialization", "paper"]) == 0
    content = json.loads((out / "results.json").read_text())
    assert content["rows"][: len(before)] == before
    table = capsys.readouterr().out
    assert "| full (initialization=paper) |" in table and "| 22,599,680 |" in table and "| 900.84 |" in table
    assert {row["model"] for row in before} == {"unigram", "bigram", "xz", "full", "sum", "global", "local"}
    assert all((out / name).is_file() for name in ("table.md", "ablation.svg", "ablation.png"))

    above = above_full(content, out)
    assert set(above) == {"sum", "global", "local", "local (initialization=paper)", "local-gated (initialization=paper)"}
    losses = {(row["model"], row["seed"]): row["val_nats_per_token"] for row in before if "seed" in row}
    for name in ("sum", "global", "local"):
        assert above[name].mean == pytest.approx(np.mean([losses[name, seed] - losses["full", seed] for seed in (0, 1)]), abs=1e-5)
        assert above[name].count == 2 and 0 < above[name].half_width < np.inf
    for line in ablation(content, out).rows:
        if line[0] in above and above[line[0]].half_width > abs(above[line[0]].mean):
            assert ("no difference shown" if above[line[0]].count > 1 else "(one seed)") in " ".join(line)
