"""What the tests share."""

import os

# Tests are many small products: one thread each, and no test reads the user's cache, corpora or the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels as numpy
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAM_DATA", raising=False)


@pytest.fixture(autouse=True)
def the_same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def int8_widened(monkeypatch):
    """int8 models multiply with numbers as they are, as exported graphs and pages do, also where the processor has products of integers."""
    monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_INT8", False)
