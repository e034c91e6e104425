"""Every input ends in a result, in one line, or in HTTP 4xx. FUZZ_EXAMPLES=100000 tries so many of each kind; `make fuzz` counts."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="pip install 'gam-lm[serve]'")
pytest.importorskip("jinja2", reason="pip install 'gam-lm[plot]'")

from inputs import KINDS

FEW = {"resumed runs": 20, "run directories": 100, "flags": 40, "results and block files": 150, "data files": 100, "tokenizer files": 40, "folders of texts": 60}
ROOT = Path(__file__).parents[2]
EXAMPLES = os.environ.get("FUZZ_EXAMPLES")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", KINDS)
def test_every_input_is_used_or_refused_in_one_line(name):
    kind, used = KINDS[name], set()

    @settings(max_examples=int(EXAMPLES or FEW.get(name, 200)), deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES is None)
    @given(made=st.one_of(kind.inputs))
    def attack(made):
        used.add(kind.check(made))

    attack()
    assert True in used and False in used  # neither is everything refused nor everything let through


def test_the_page_has_the_counts_of_the_results_and_nothing_was_lost():
    rows = json.loads((ROOT / "results/reliability/results.json").read_text())["rows"]
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert rows
    for row in rows:
        counts = [row[key] for key in ("tried", "used", "refused", "kills", "requests", "steps") if key in row]
        assert counts and all(f"{count:,}" in page for count in counts)
        assert not any(row.get(key) for key in ("lost", "differing", "errors_500", "failed"))
