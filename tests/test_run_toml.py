"""Every measuring verb leaves run.toml, which repeats it."""

import tomllib

import pytest
from one_command import make_folder

from gam_lm.cli.config_file import keep_repeating, repeating
from gam_lm.cli.main import MEASURING, VERBS, parse, run

MEASURING_VERBS = sorted(name for name in VERBS if name in MEASURING or name.startswith("bench-"))


@pytest.mark.parametrize("name", MEASURING_VERBS)
def test_the_file_of_a_verb_gives_the_same_verb(tmp_path, name):
    first = parse([name, *(["runs/x"] if VERBS[name].positional else []), "--out", str(tmp_path)])
    for verb in first:
        (tmp_path / "run.toml").write_text(repeating(verb), encoding="utf-8")
        assert parse([name, "--config", str(tmp_path / "run.toml")]) == [verb]


@pytest.mark.parametrize(
    "flags",
    [
        ["bench", "--models", "gam", "mamba", "--seeds", "3", "4", "--gam.write", "mean", "--primary", "gam:mamba", "--primary", "gam:llama", "--margin", "0.1"],
        ["bench", "--preset", "small-cpu", "--validate-every", "None", "--no-timing"],
        ["tune", "--optimizer", "muon", "--search", "learning_rate=1e-3:1e-2", "--storage", "sqlite:///a b.db"],
        ["recall", "--preset", "zoology", "--pairs", "4", "8", "--task", "copying", "--betas", "0.8", "0.9"],
    ],
)  # fmt: skip
def test_flags_presets_and_what_is_switched_off_come_back(tmp_path, flags):
    (verb,) = parse([*flags, "--out", str(tmp_path / "out")])
    (tmp_path / "run.toml").write_text(repeating(verb), encoding="utf-8")
    (again,) = parse([flags[0], "--config", str(tmp_path / "run.toml")])
    if getattr(verb, "preset", None):
        assert again.preset is None
        verb = type(verb)(**{**vars(verb), "preset": None})
    assert again == verb


def test_each_part_of_a_preset_of_several_has_its_own_file(tmp_path):
    for verb in parse(["bench", "--preset", "paper", "--out", str(tmp_path)]):
        folder = tmp_path / verb.part
        folder.mkdir()
        keep_repeating(verb)
        assert not (folder / "run.toml").exists()  # nothing was measured
        (folder / "results.json").write_text("{}", encoding="utf-8")
        keep_repeating(verb)
        (again,) = parse(["bench", "--config", str(folder / "run.toml")])
        assert (again.out, again.recipe, again.models, again.text) == (folder, verb.recipe, verb.models, verb.text)


def test_a_measurement_writes_its_file_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, monkeypatch)
    small = ["--data", "my_text.txt", "--models", "gam", "--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--context", "16", "--steps", "2",
             "--batch-size", "2", "--vocab-size", "280", "--precision", "fp32", "--device", "cpu", "--no-timing", "--no-match-parameters"]  # fmt: skip
    assert run(["bench", *small, "--dry-run", "--out", "out"]) == 0 and not (tmp_path / "out/run.toml").exists()
    assert run(["bench", *small, "--out", "out"]) == 0
    rows = (tmp_path / "out/results.json").read_text(encoding="utf-8")
    assert tomllib.loads((tmp_path / "out/run.toml").read_text(encoding="utf-8"))["gam"]["num_heads"] == 2
    before = (tmp_path / "out/run.toml").read_bytes()
    assert run(["bench", "--config", "out/run.toml"]) == 0
    assert (tmp_path / "out/results.json").read_text(encoding="utf-8") == rows and (tmp_path / "out/run.toml").read_bytes() == before
    assert run(["bench", "--models", "mamba", "--data", "missing.txt", "--out", "out"]) == 2
    assert (tmp_path / "out/run.toml").read_bytes() == before  # a refused command leaves it
