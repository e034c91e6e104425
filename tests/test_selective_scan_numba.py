"""The selective scan compiled by Numba, against the recurrence in float64 and against the scan in plain PyTorch."""

import os
import re
import signal

import pytest
import torch
from scans import as_exact, error, parts, same_model, taken

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, MissingExtraError
from gam_lm.model import LanguageModel
from gam_lm.ops.selective_scan import naive_selective_scan, selective_scan
from gam_lm.ops.selective_scan_kernels import HAS_NUMBA, automatic_backend, numba_selective_scan, scan_by

with_numba = pytest.mark.skipif(not HAS_NUMBA, reason="no numba here: pip install 'gam-lm[numba]'")


def recurrence(*values, index_BT=None):
    return naive_selective_scan(*values, index_BT)


def check(values, *, dtype=torch.float32, floor=2.0**-21, index=None):
    """The error is below twice that of the PyTorch path (or of a few roundings), for everything that is computed."""
    ours, plain = (taken(rule, values, dtype, index=index) for rule in (numba_selective_scan, selective_scan))
    as_exact(ours, plain, taken(recurrence, values, index=index), floor)


@with_numba
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 32, 100])
def test_outputs_state_and_gradients_are_as_exact_as_the_torch_path(T):
    check(parts(2, T))


@with_numba
@pytest.mark.parametrize("E, N", [(1, 1), (127, 3), (128, 16), (300, 2), (8, 70)])
def test_any_number_of_channels_and_states(E, N):
    check(parts(2, 20, E, N))


@with_numba
def test_half_precision_inputs_are_computed_in_float32():
    check(parts(1, 40), dtype=torch.bfloat16, floor=2.0**-8)
    check(parts(1, 40), dtype=torch.float16, floor=2.0**-11)
    assert numba_selective_scan(*(each.bfloat16() for each in parts(1, 4)))[0].dtype == torch.float32


@with_numba
def test_packed_rows_are_their_sequences_alone():
    starts = torch.rand(3, 90) < 0.1
    starts[0, [0, 16, 17, 89]] = True  # the first row does not go on with its state
    check(parts(3, 90), index=starts.long().cumsum(1))


@with_numba
def test_no_first_state_is_zero_and_inputs_may_be_views():
    values = [each.float() for each in parts(2, 30, 5, 3)]
    zero = torch.zeros(2, 3, 5)
    wide = [torch.randn(*each.shape, 2) for each in values]
    for view, each in zip(wide, values, strict=True):
        view[..., 1] = each
    views = [view[..., 1] for view in wide]
    for a, b in zip(numba_selective_scan(*views[:5]), numba_selective_scan(*values[:5], zero), strict=True):
        assert torch.equal(a, b)


@with_numba
def test_steps_of_size_zero_change_nothing_and_huge_ones_forget_everything():
    values = parts(1, 40)
    values[1][:, 12:] = 0
    _, state = numba_selective_scan(*(each.float() for each in values))
    _, before = numba_selective_scan(*(each[:, :12].float() if i in (0, 1, 3, 4) else each.float() for i, each in enumerate(values)))
    assert torch.equal(state, before)
    values[1][:, [0, 7, 33]] = 1e4
    for found, wanted in zip(numba_selective_scan(*(each.float() for each in values)), naive_selective_scan(*values), strict=True):
        assert found.isfinite().all() and error(found.double(), wanted) < 1e-6


@with_numba
@pytest.mark.parametrize("place", [0, 1, 3, 4, 5])
def test_what_is_no_number_stays_none(place):
    """A run that diverges must be seen to."""
    values = [each.float() for each in parts(1, 20)]
    values[place][0, 1] = torch.nan
    y, state = numba_selective_scan(*values)
    assert y.isnan().any() and (place == 4 or state.isnan().any())


@with_numba
def test_threads_and_a_repeated_call_give_the_same_bits():
    values, before = parts(3, 40, 200, 4), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(taken(numba_selective_scan, values, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@with_numba
def test_an_error_in_a_thread_is_an_error_of_the_call(monkeypatch):
    import gam_lm.ops.selective_scan_numba as kernels

    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(kernels, "forward", broken)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="broken"):
        numba_selective_scan(*(each.float() for each in parts(4, 3)))


@with_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    values = [each.float() for each in parts(4, 3)]
    expected = numba_selective_scan(*values)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for a thread that is not there ends by this
        with torch.no_grad():
            os._exit(0 if torch.equal(numba_selective_scan(*values)[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@with_numba
def test_a_second_derivative_is_refused():
    values = [each.float().requires_grad_() for each in parts(1, 5)]
    value = numba_selective_scan(*values)[0].square().sum()
    with pytest.raises(RuntimeError, match="has first derivatives alone: leave create_graph out"):
        torch.autograd.grad(value, values[0], create_graph=True)


@with_numba
@pytest.mark.filterwarnings("ignore")
def test_the_operator_is_registered_as_torch_wants_it():
    from gam_lm.ops.selective_scan_cpu import selective_scan

    values = [each.float().requires_grad_() for each in parts(1, 3)]
    torch.library.opcheck(selective_scan, (*values, torch.ones(1, 3)), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@with_numba
def test_a_folder_that_nothing_can_be_written_to_costs_the_cache_alone(monkeypatch):
    import numba

    import gam_lm.ops.selective_scan_numba as kernels

    original = numba.njit

    def njit(function, **options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return original(function, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert kernels._jit(lambda x: x + 1)(1) == 2


def small(backend):
    options = {"mamba": {"backend": backend, "state_size": 3}}
    return LanguageModel(ModelConfig.from_dict({"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "mixers": ["mamba"], "options": options}))


@with_numba
def test_a_model_on_the_loops_is_the_model():
    segments = torch.ones(2, 40, dtype=torch.long)
    segments[0, 9:], segments[0, 33:] = 2, 0
    same_model("numba", torch.randint(11, (2, 40)), segments)


@with_numba
def test_an_exported_graph_asks_for_no_library():
    graph = torch.export.export(small("auto").eval(), (torch.randint(11, (1, 6)),))
    assert not [node for node in graph.graph.nodes if "numba" in str(node.target)]
    with pytest.raises(Exception, match="backend is 'numba' in a graph that is exported"):
        torch.export.export(small("numba").eval(), (torch.randint(11, (1, 6)),))


@with_numba
def test_what_the_loops_do_not_have_is_refused():
    with pytest.raises(InputError, match=r"backend is 'numba' with float64: .* use backend='torch'"):
        numba_selective_scan(*parts(1, 2))
    with pytest.raises(InputError, match=r"backend is 'numba' on meta: .* use backend='torch'"):
        numba_selective_scan(*(each.to("meta", torch.float32) for each in parts(1, 2)))


@with_numba
def test_auto_takes_the_loops_on_a_cpu_alone_and_never_refuses():
    assert automatic_backend("cpu", 16, torch.float32) == automatic_backend("cpu", 500, torch.bfloat16) == "numba"
    assert automatic_backend("cpu", 16, torch.float64) == automatic_backend("mps", 16, torch.float32) == "torch"
    assert scan_by("auto", "cpu", 16, torch.float32) is scan_by("numba", "cuda", 16, torch.float64) is numba_selective_scan
    assert scan_by("torch", "cpu", 16, torch.float32) is selective_scan


def test_without_numba_auto_takes_plain_pytorch_and_numba_asks_for_its_extra(monkeypatch):
    monkeypatch.setattr("gam_lm.ops.selective_scan_kernels.HAS_NUMBA", False)
    assert automatic_backend("cpu", 16, torch.float32) == "torch"
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'gam-lm[numba]'")):
        numba_selective_scan(*parts(1, 2))
