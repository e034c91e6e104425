"""What the README shows is what the code does and what the results say."""

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


def test_the_tables_are_those_of_the_committed_results():
    assert render(README, ROOT) == README, "run: gam report --readme README.md"


def test_every_file_that_the_readme_and_docs_name_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) < 150


def test_a_readme_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        update(tmp_path / "README.md")
