"""What the README shows is what the code does and what the results say."""

import json
import re
from pathlib import Path

import pytest

from gam_lm.errors import InputError
from gam_lm.report.readme import render, update

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [line.split("  # ")[1] for line in code.splitlines() if line.startswith("print")]


@pytest.mark.parametrize("page", ["README.md", "docs/memory.md"])
def test_the_tables_are_those_of_the_committed_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert render(text, (ROOT / page).parent) == text, f"run: gam report --readme {page}"


def test_every_file_that_the_readme_and_docs_name_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) < 150


def test_a_readme_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        update(tmp_path / "README.md")


def test_a_mark_takes_the_table_of_its_verb_and_the_rows_that_it_names(tmp_path):
    machine = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}
    row = {"model": "gam-static", "context": 9, "dtype": "fp32", "variant": "eager", "outcome": "ok", "parameters": 10, "step_ms": 2.0,
           "bandwidth": 4e10, "share_of_bandwidth": 0.8, "state_bytes": 2048}  # fmt: skip
    content = {"command": "gam bench-decode --out x", "environment": machine, "corpus": None, "rows": [row | {"batch_size": B} for B in (1, 16)]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    text = "before\n<!-- table results.json{} -->\nold\n<!-- end -->\nafter"
    whole, chosen = (render(text.format(words), tmp_path) for words in ("", " batch_size=16 dtype=fp32"))
    assert whole.count("### batch") == 2 and chosen.count("### batch") == 1 and "### batch 16" in chosen
    assert chosen.startswith("before\n<!-- table results.json batch_size=16 dtype=fp32 -->\n") and chosen.endswith("<!-- end -->\nafter")
    assert render(chosen, tmp_path) == chosen
    with pytest.raises(InputError, match="no rows with batch_size=3"):
        render(text.format(" batch_size=3"), tmp_path)
