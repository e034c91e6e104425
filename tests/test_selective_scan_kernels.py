"""The kernels of the selective scan, in Triton's interpreter where no GPU is, against the recurrence in float64."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from scans import NAMES, as_exact, error, parts, same_model, taken

from gam_lm.errors import InputError, MissingExtraError
from gam_lm.ops.selective_scan import naive_selective_scan, selective_scan
from gam_lm.ops.selective_scan_kernels import automatic_backend, scan_by, triton_selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here: pip install 'gam-lm[triton]'")


def kernel(x, dt, A, B, C, first=None, index_BT=None):
    """The operator itself, which has no way of its own for a single token."""
    from gam_lm.ops.selective_scan_triton import selective_scan

    return selective_scan(x, dt, A.float(), B, C, None if first is None else first.float(), index_BT)


def recurrence(x, dt, A, B, C, first=None, index_BT=None):
    return naive_selective_scan(x, dt, A, B, C, x.new_zeros(len(x), *A.shape) if first is None else first, index_BT)


def check(values, *, dtype=torch.float32, floor=2.0**-22, index=None):
    """The kernels' error is below twice that of the PyTorch path (or of one rounding), for everything that they compute."""
    exact = taken(recurrence, values, index=index)
    ours, plain = (taken(rule, values, dtype, DEVICE, index) for rule in (kernel, selective_scan))
    as_exact(ours, plain, exact, floor)


@with_triton
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
def test_outputs_state_and_gradients_are_as_exact_as_the_torch_path(T):
    check(parts(1, T))


@with_triton
@pytest.mark.parametrize("B, E, N", [(2, 35, 3), (1, 70, 1), (1, 32, 16)])
def test_any_number_of_channels_and_states(B, E, N):
    check(parts(B, 5, E, N))


@with_triton
def test_without_a_first_state_and_in_half_precision():
    check(parts(2, 5)[:5])
    check(parts(1, 70), dtype=torch.bfloat16, floor=2.0**-8)
    check(parts(1, 9), dtype=torch.float16, floor=2.0**-11)


@with_triton
def test_packed_rows_are_their_sequences_alone_and_padding_changes_nothing():
    starts = torch.zeros(2, 70, dtype=torch.long)
    starts[0, [3, 20, 64]] = 1
    starts[1, [0, 63, 69]] = 1  # the second row does not go on with its state
    check(parts(2, 70), index=starts.cumsum(1))
    values = parts(1, 70)
    values[1][:, 40:] = 0
    check(values)
    y, h = (each.float().to(DEVICE) for each in kernel(*(each.float().to(DEVICE) for each in values)))
    torch.testing.assert_close(h, kernel(*(each[:, :40].float().to(DEVICE) if i in (0, 1, 3, 4) else each.float().to(DEVICE) for i, each in enumerate(values)))[1])
    assert y.isfinite().all()


@with_triton
def test_nothing_is_read_that_was_not_written(monkeypatch):
    """Buffers are full of NaN until a kernel writes them, and the inputs lie between NaN; the backward pass goes by a chunk at a time."""
    import gam_lm.ops.selective_scan_triton as kernels

    fresh = kernels._buffer
    monkeypatch.setattr(kernels, "_buffer", lambda *given: fresh(*given).fill_(torch.nan))
    monkeypatch.setattr(kernels, "SCRATCH", 1)

    def between(*values, **options):
        lain = []
        for each in values:
            wide = torch.full((2000,), torch.nan, dtype=each.dtype, device=each.device)
            lain.append(torch.cat([wide[:1000], each.flatten(), wide[1000:]])[1000 : 1000 + each.numel()].view(each.shape))
        return kernel(*lain, **options)

    values, index = parts(2, 66, 5, 3), torch.zeros(2, 66, dtype=torch.long)
    index[0, 30:] = 1
    for found, wanted in zip(taken(between, values, torch.float32, DEVICE, index), taken(recurrence, values, index=index), strict=True):
        assert error(found, wanted) < 1e-6


@with_triton
def test_two_halves_are_the_whole_and_a_repeated_call_gives_the_same_bits():
    values = [each.float().to(DEVICE) for each in parts(1, 70)]
    y, last = kernel(*values)
    halves = [[each[:, part] if i in (0, 1, 3, 4) else each for i, each in enumerate(values)] for part in (slice(0, 33), slice(33, 70))]
    first, state = kernel(*halves[0])
    rest, end = kernel(*halves[1][:5], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(taken(kernel, values, torch.float32, DEVICE), taken(kernel, values, torch.float32, DEVICE), strict=True))


@with_triton
@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_gradients_in_half_precision_are_rounded_to_the_nearest(dtype, step):
    """From the same numbers in fp32: rounding to the nearest is about a fifth of a step off, cutting digits off about two fifths."""
    values = [each.to(dtype) for each in parts(1, 70)]
    low, full = (taken(kernel, values, each, DEVICE) for each in (dtype, torch.float32))
    for name, a, b in list(zip(NAMES, low, full, strict=True))[2:]:
        assert error(a, b) < 0.3 * step, name
    assert error(low[0], full[0]) < 1e-6 and error(low[1], full[1]) < 1e-6


@with_triton
def test_huge_steps_forget_everything():
    values = parts(1, 20)
    values[1][:, [0, 7, 13]] = 1e4
    for found, wanted in zip(kernel(*(each.float().to(DEVICE) for each in values)), recurrence(*values), strict=True):
        assert error(found.double().cpu(), wanted) < 1e-6


@with_triton
@pytest.mark.filterwarnings("ignore")
def test_the_operator_is_registered_as_torch_wants_it():
    from gam_lm.ops.selective_scan_triton import selective_scan

    *values, first = (each.to(DEVICE, torch.float32).requires_grad_() for each in parts(1, 3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for last in ((first, None), (None, torch.tensor([[0, 1, 1]], device=DEVICE))):
        torch.library.opcheck(selective_scan, (*values, *last), test_utils=tests)


@with_triton
def test_a_model_on_the_kernels_is_the_model():
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9], device=DEVICE)
    same_model("triton", torch.randint(11, (2, 9), device=DEVICE), segments)


@with_triton
def test_what_the_kernels_do_not_have_is_refused(monkeypatch):
    import gam_lm.ops.selective_scan_triton as kernels

    def refused(values, dtype=torch.float32):
        with pytest.raises(InputError) as caught:
            triton_selective_scan(*(each.to(DEVICE, dtype) for each in values))
        return str(caught.value)

    assert "float64" in refused(parts(1, 2), torch.float64) and "state_size 65" in refused(parts(1, 2, 1, 65))
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        assert refused(parts(1, 1)) == refused(parts(1, 2)) == "backend is 'triton' on cpu: its kernels run on a GPU, use backend='torch'"


@with_triton
def test_auto_takes_the_kernels_on_a_gpu_alone_and_never_refuses():
    assert automatic_backend("cuda", 16, torch.bfloat16) == "triton"
    assert automatic_backend("cuda", 16, torch.float64) == automatic_backend("cuda", 65, torch.float32) == "torch"
    assert scan_by("torch", "cuda", 16, torch.float32) is selective_scan
    assert scan_by("auto", "cuda", 16, torch.float32) is scan_by("triton", "cpu", 16, torch.float64) is triton_selective_scan


def test_triton_asks_for_its_extra(monkeypatch):
    import gam_lm.ops

    monkeypatch.delattr(gam_lm.ops, "selective_scan_triton", raising=False)
    monkeypatch.setitem(sys.modules, "gam_lm.ops.selective_scan_triton", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'gam-lm[triton]'")):
        triton_selective_scan(*parts(1, 2))


COMPILES = """
import gam_lm.ops.selective_scan_triton as kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NUMBERS, LOW = {"T", "J", "N", "E", "X", "begin_chunk", "part"}, {"x", "B", "C", "pick", "weight", "dx"}
tile = {"L": 64, "P": 16, "S": 32, "PACKED": True}
for kernel, fixed in (
    (kernels._summaries, {**tile, "BACK": False}), (kernels._summaries, {**tile, "BACK": True}),
    (kernels._carry, {"W": 128, "GIVEN": True, "BACK": True}), (kernels._forward, tile), (kernels._backward, {**tile, "EXACT": "ieee"}),
):
    kinds = {
        name: "constexpr" if name in fixed else "i32" if name in NUMBERS else "*i64" if name == "index" else "*bf16" if name in LOW else "*fp32"
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in {*fixed, "begin_chunk"}}  # as with E = 512 or 2048
    for known in ({}, even):
        source = ASTSource(fn=kernel, signature=kinds, constexprs=values, attrs=known)
        print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["cubin"]))
"""


@with_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """What the interpreter takes the compiler may not: the machine code for Hopper, for which no GPU is needed."""
    there = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, env=there, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 10 and all(int(size) > 5_000 for size in done.stdout.split())
