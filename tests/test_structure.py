"""The rules of the house that no other tool checks: names of mixers, lengths of files, circles of imports, a naive reference beside each op."""

import ast
import inspect
import re
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import grimp
import pytest

import gam_lm
from gam_lm.mixers.registry import mixer_names

ROOT = Path(gam_lm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMED_MIXERS = {
    ("cli/help.py", "gam"): "the command",
    ("config.py", "gam"): "the model_type in a config.json",
    ("hf/baselines.py", "attention"): "transformers' word for a kind of layer",
    ("hf/baseline_networks.py", "attention"): "transformers' word in the name of a dropout",
}
"""Literals that are no mixer's name, and what they are."""

DEFERRED = {("gam_lm.inference.context", "gam_lm.inference.context_file")}
"""Imports within a function that stand for a method: Context.save and Context.load."""


def place(file):
    return file.relative_to(ROOT).as_posix()


def test_no_mixer_is_named_outside_mixers_and_presets():
    names, found = set(mixer_names()), set()
    for file in FILES:
        if place(file).startswith(("mixers/", "presets/")):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                found.add((place(file), node.value))
    assert found <= NAMED_MIXERS.keys()


@pytest.mark.parametrize("file", FILES, ids=place)
def test_no_file_is_longer_than_300_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


def test_the_model_has_at_most_250_lines():
    assert len((ROOT / "model.py").read_text(encoding="utf-8").splitlines()) <= 250


def test_nothing_else_lies_in_the_root():
    modules = {file.name for file in ROOT.glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "checkpoint.py", "config.py", "errors.py", "model.py", "reference.py"}
    rooms = {each.name for each in ROOT.iterdir() if each.is_dir() and any(each.glob("*.py"))}
    assert rooms == {
        "cli", "data", "diagnostics", "experiments", "export", "hf", "inference", "mixers", "ops", "presets", "report", "results", "runtime", "serve", "training",
    }  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_there_is_no_circle_of_imports():
    graph = grimp.build_graph("gam_lm", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) - {after for before, after in DEFERRED if before == module} for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError


@pytest.mark.parametrize("op", ["causal_conv", "cross_entropy", "delta_rule", "mean_rule", "retrieval", "selective_scan"])
def test_an_op_has_a_naive_reference_beside_it(op):
    module = import_module(f"gam_lm.ops.{op}")
    naive = [each for name, each in vars(module).items() if name.startswith("naive_")]
    assert naive and all("for tests" in inspect.getdoc(each) for each in naive)


def test_no_docstring_has_the_markup_of_another_documentation_tool():
    pattern = re.compile(r":(?:class|func|meth|attr|data|mod|obj):`")
    assert not [place(file) for file in FILES if pattern.search(file.read_text(encoding="utf-8"))]
