"""A short run of the load that tests/load/driver.py runs for as long as one likes."""

import sys

import pytest
from test_serve import small_model, small_tokenizer

from gam_lm import save_model

pytest.importorskip("uvicorn", reason="pip install 'gam-lm[serve]'")

from driver import load


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_64_clients_of_all_kinds_get_what_each_gets_alone(tmp_path):
    # In double precision answers drawn together differ from those alone by less than any draw can tell.
    save_model(tmp_path / "cat", small_model(small_tokenizer().get_vocab_size(), num_hidden_layers=2).double(), small_tokenizer())
    figures, tally, log = load(tmp_path / "cat", clients=64, seconds=8, flags=("--device", "cpu", "--cache-mb", "2"))
    assert figures["requests"] > 64 and not figures["errors_500"], figures
    assert not tally.failed and not tally.differing, (tally.failed[:3], tally.differing[:3])
    assert not any("Traceback" in line for line in log) and len(log) < 40, log
    assert figures["descriptors_at_end"] < 40
