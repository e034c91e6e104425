"""The kernels of the delta rule against the recurrence in float64: our own in Triton's interpreter, flash-linear-attention's call with a stand-in for its kernel."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import normalize

from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, MissingExtraError
from gam_lm.mixers.mamba import Mamba
from gam_lm.mixers.registry import _log_once
from gam_lm.model import LanguageModel
from gam_lm.ops.delta_rule import delta_memory, naive_delta_memory
from gam_lm.ops.delta_rule_kernels import by_gated_delta_rule, fla_delta_memory, triton_delta_memory
from gam_lm.ops.segments import pack
from gam_lm.training.loop import new_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here: pip install 'gam-lm[triton]'")
NAMES = ("g", "state", "read", "write", "value", "gate", "log_decay", "bank", "first")

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from gam_lm.ops.triton_tiles import put, tile

    @triton.jit
    def _copy(source, target, Y, X, EXACT: tl.constexpr):
        y_Y, x_X = tl.arange(0, 16), tl.arange(0, 64)
        put(target, tile(source, y_Y, Y, x_X, X, X), y_Y, Y, x_X, X, X, EXACT)


def parts(B, T, H=2, M=5, E=3):
    """Inputs of the rule and a first state, in float64."""
    read, write = (normalize(torch.randn(B, T, H, M, dtype=torch.float64), dim=-1) for _ in range(2))
    value, bank, first = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, T, H, E), (H, M, E), (B, H, M, E)))
    return [read, write, value, torch.rand(B, T, H, dtype=torch.float64), -0.6 * torch.rand(B, T, H, dtype=torch.float64), bank, first]


def index_of(*lengths_of_rows):
    """index_BT of rows whose sequences have these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths_of_rows])


def recurrence(read, write, value, gate, log_decay, bank, first=None, index_BT=None):
    """`naive_delta_memory` of every sequence alone; one of index 0 goes on with the row's state."""
    rows, states = [], []
    for n in range(len(read)):
        index_T = torch.zeros(read.shape[1], dtype=torch.long) if index_BT is None else index_BT[n]
        found = []
        for i, count in zip(*index_T.unique_consecutive(return_counts=True), strict=True):
            t = sum(len(each) for each in found)
            own = [each[n : n + 1, t : t + int(count)] for each in (read, write, value, gate, log_decay)]
            g, D = naive_delta_memory(*own, bank, first[n : n + 1] if first is not None and i == 0 else None)
            found.append(g[0])
        rows.append(torch.cat(found))
        states.append(D[0])
    return torch.stack(rows), torch.stack(states)


def taken(rule, values, dtype=torch.float64, device="cpu", **options):
    """Output, state, and the gradients of all inputs under weights that are the same for every rule."""
    leaves = [each.detach().to(device, dtype).requires_grad_() for each in values]
    g, D = rule(*leaves, **options)
    draw = torch.Generator().manual_seed(3)
    wg, wD = (torch.randn(each.shape, generator=draw, dtype=torch.float64).to(device) for each in (g, D))
    ((g.double() * wg).sum() + (D.double() * wD).sum()).backward()
    return [each.detach().double().cpu() for each in (g, D, *(leaf.grad for leaf in leaves))]


def through(rule):
    """A rule that takes and gives states as tuples, called with tensors."""

    def call(*values, **options):
        g, (D,) = rule(*values[:6], (values[6],) if len(values) > 6 else None, **options)
        return g, D

    return call


def error(x, exact):
    return float((x - exact).norm() / exact.norm().clamp(min=1e-12))


def check(values, *, dtype=torch.float32, floor=2.0**-23, index_BT=None):
    """The kernel's error is below twice that of the PyTorch path (or of one rounding), for everything that it computes."""
    exact = taken(recurrence, values, index_BT=index_BT)
    given = {} if index_BT is None else {"index_BT": index_BT.to(DEVICE)}
    ours, plain = (taken(through(rule), values, dtype, DEVICE, **given) for rule in (triton_delta_memory, delta_memory))
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
        assert a.isfinite().all(), name
        assert error(a, c) <= 2 * max(error(b, c), floor), (name, error(a, c), error(b, c))


@with_triton
@pytest.mark.parametrize("T", [1, 63, 64, 65, pytest.param(130, marks=pytest.mark.slow)])
def test_outputs_state_and_gradients_are_as_exact_as_the_torch_path(T):
    check(parts(1, T))


@with_triton
@pytest.mark.parametrize("M, E", [pytest.param(20, 70, marks=pytest.mark.slow), (17, 16)])
def test_heads_of_any_width_and_several_blocks_of_values(M, E):
    check(parts(1, 35, 2, M, E))


@with_triton
def test_without_a_first_state_and_in_bf16():
    check(parts(2, 34)[:6])
    check(parts(1, 40), dtype=torch.bfloat16, floor=2.0**-8)


@with_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tile_is_rounded_as_torch_rounds_it(dtype):
    from gam_lm.ops.delta_rule_triton import INTERPRETED

    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2 - 2.0**-8, torch.inf, 0.0]).repeat(10)
    wide = torch.cat([ties[None], torch.randn(14, 60) * torch.logspace(-4, 4, 60)]).to(DEVICE)
    narrow = torch.empty_like(wide, dtype=dtype)
    _copy[(1,)](wide, narrow, *wide.shape, EXACT="interpreted" if INTERPRETED else "ieee")
    assert torch.equal(narrow, wide.to(dtype))


@with_triton
def test_packed_rows_are_their_sequences_alone():
    check(parts(2, 45), index_BT=index_of([12, 32, 1], [45]))
    starts_anew = index_of([20, 14], [5, 29])
    starts_anew[1] += 1  # the row goes on with no state
    check(parts(2, 34), index_BT=starts_anew)
    check(parts(2, 34)[:6], index_BT=starts_anew)


@with_triton
def test_nothing_is_read_that_was_not_written(monkeypatch):
    """Buffers are full of NaN until a kernel writes them, and the inputs lie between NaN."""
    import gam_lm.ops.delta_rule_triton as kernels

    fresh = kernels._buffer
    monkeypatch.setattr(kernels, "_buffer", lambda *given: fresh(*given).fill_(torch.nan))

    def between(rule):
        def call(*values, **options):
            lain = []
            for each in values:
                wide = torch.full((each.numel() + 2000,), torch.nan, dtype=each.dtype, device=each.device)
                lain.append(torch.cat([wide[:1000], each.flatten(), wide[1000:]])[1000 : 1000 + each.numel()].view(each.shape))
            return rule(*lain, **options)

        return call

    values, index_BT = parts(2, 33), index_of([20, 13], [33])
    exact = taken(recurrence, values, index_BT=index_BT)
    for found, wanted in zip(taken(between(through(triton_delta_memory)), values, torch.float32, DEVICE, index_BT=index_BT.to(DEVICE)), exact, strict=True):
        assert error(found, wanted) < 1e-6


@with_triton
def test_decays_of_minus_infinity_forget_everything_and_repeated_keys_stay_exact():
    values = parts(1, 40)
    values[4][:, [0, 7, 33]] = -torch.inf
    values[1][:] = values[1][:, :1]  # powers of the system of such keys grow to 10⁸
    values[3][:] = 1
    exact = recurrence(*values)
    for found, wanted in zip(through(triton_delta_memory)(*(each.to(DEVICE, torch.float32) for each in values)), exact, strict=True):
        assert error(found.double().cpu(), wanted) < 1e-6


@with_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_operator_is_registered_as_torch_wants_it():
    from gam_lm.ops.delta_rule_triton import delta_rule

    read, write, value, gate, log_decay, _, first = (each.to(DEVICE, torch.float32).requires_grad_() for each in parts(1, 3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for last in ((first, None), (None, index_of([1, 2]).to(DEVICE))):
        torch.library.opcheck(delta_rule, (read, write, value, gate, log_decay, *last), test_utils=tests)


@with_triton
@pytest.mark.parametrize("mixer", ["gam", "gated_deltanet"])
def test_a_model_on_the_kernel_is_the_model(mixer):
    def model(backend):
        options = {mixer: {"backend": backend, "num_heads": 2}}
        torch.manual_seed(0)
        return LanguageModel(ModelConfig.from_dict({"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "mixers": [mixer], "options": options})).to(DEVICE)

    tokens = torch.randint(11, (2, 9), device=DEVICE)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9], device=DEVICE)
    fast, plain = model("triton"), model("torch")
    torch.testing.assert_close(fast(tokens, segments=segments)[0], plain(tokens, segments=segments)[0], rtol=1e-4, atol=1e-5)
    start, state = fast.stream(tokens[:, :8])
    torch.testing.assert_close(torch.cat([start, fast.stream(tokens[:, 8:], state)[0]], 1), plain.stream(tokens)[0], rtol=1e-4, atol=1e-5)


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiler_takes_the_kernel_as_one_operator(packed):
    config = ModelConfig.from_dict({"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "options": {"gam": {"backend": "triton", "num_heads": 2}}})
    model = LanguageModel(config).to(DEVICE)
    tokens = torch.randint(11, (2, 9), device=DEVICE)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9], device=DEVICE) if packed else None
    expected = torch.autograd.grad(model(tokens, tokens, segments=segments)[1], list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(tokens, tokens, segments=segments)[1], list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@with_triton
def test_what_the_kernel_does_not_have_is_refused(monkeypatch):
    import gam_lm.ops.delta_rule_triton as kernels

    def refused(values, dtype=torch.float32):
        with pytest.raises(InputError) as caught:
            through(triton_delta_memory)(*(each.to(DEVICE, dtype) for each in values))
        return str(caught.value)

    assert "float64" in refused(parts(1, 2), torch.float64) and "257 slots" in refused(parts(1, 2, 1, 257, 1))
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        assert refused(parts(1, 2)) == "backend is 'triton' on cpu: its kernels run on a GPU, use backend='torch'"


COMPILES = """
import gam_lm.ops.delta_rule_triton as kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KINDS = {"cu_seqlens": "*i64", "first_row": "*i64", "last_row": "*i64", "chunk": "*i64", "tokens": "i32", "H": "i32", "M": "i32", "E": "i32"}
FP32 = {"gate", "log_decay", "first", "last", "starts", "dlast", "dgate", "ddecay", "dfirst"}
for kernel, more in ((kernels._forward, {"STARTS": False}), (kernels._forward, {"STARTS": True}), (kernels._backward, {})):
    fixed = {"L": 32, "P": 64, "S": 64, "LEVELS": 5, "EXACT": "tf32x3", **more}
    kinds = {name: "constexpr" if name in fixed else KINDS.get(name, "*fp32" if name in FP32 else "*bf16") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1}).asm["cubin"]))
"""


@with_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """What the interpreter takes the compiler may not: the machine code for Hopper, for which no GPU is needed."""
    there = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, env=there, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3 and all(int(size) > 10_000 for size in done.stdout.split())


def test_triton_asks_for_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gam_lm.ops.delta_rule_triton", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'gam-lm[triton]'")):
        through(triton_delta_memory)(*parts(1, 2))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_a_named_kernel_is_never_replaced_by_another(T, packed):
    with pytest.raises(InputError, match="backend is 'fla' on cpu"):
        through(fla_delta_memory)(*parts(1, T), index_BT=torch.zeros(1, T, dtype=torch.long) if packed else None)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None, **unknown
):  # fmt: skip
    """flash-linear-attention's call, by the recurrence as its paper states it, a token at a time."""
    assert not unknown and not use_qk_l2norm_in_kernel and output_final_state
    B, T, H, K = q.shape
    if cu_seqlens is None:
        bounds = [(n, 0, T) for n in range(B)]
    else:
        assert B == 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == T and cu_seqlens.dtype == torch.long
        bounds = [(0, int(a), int(b)) for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    assert initial_state is None or initial_state.shape == (len(bounds), H, K, v.shape[-1])
    outputs, states = {}, []
    for i, (n, a, b) in enumerate(bounds):
        S = torch.zeros(H, K, v.shape[-1], dtype=g.dtype) if initial_state is None else initial_state[i]
        for t in range(a, b):
            S = S * g[n, t].exp()[:, None, None]
            held = torch.einsum("hk,hkv->hv", k[n, t], S)
            S = S + torch.einsum("hk,hv->hkv", k[n, t], beta[n, t][:, None] * (v[n, t] - held))
            outputs[n, t] = scale * torch.einsum("hk,hkv->hv", q[n, t], S)
        states.append(S)
    return torch.stack([torch.stack([outputs[n, t] for t in range(T)]) for n in range(B)]), torch.stack(states)


@pytest.mark.parametrize("index_BT", [None, index_of([3, 1, 5], [9]), index_of([4, 5], [2, 7]) + torch.tensor([[0], [1]])])
@pytest.mark.parametrize("begun", [True, False])
def test_flash_linear_attention_gets_sequences_states_and_gradients(index_BT, begun):
    values = parts(2, 9)[: 7 if begun else 6]

    def rule(*inputs, index_BT=None):
        return by_gated_delta_rule(chunk_gated_delta_rule, *inputs, low=torch.float64, wide=torch.float64, index_BT=index_BT)

    for found, wanted in zip(taken(through(rule), values, index_BT=index_BT), taken(recurrence, values, index_BT=index_BT), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_kernel_is_looked_for_where_flash_linear_attention_has_it(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls, module = [], ModuleType("fla.ops.gated_delta_rule")

    def kernel(q, k, v, g, beta, **options):
        calls.append((q.shape, {each.dtype for each in (q, k, v)}, g.dtype, options["cu_seqlens"].shape[0]))
        return v, q.new_empty(options["cu_seqlens"].shape[0] - 1, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)

    module.chunk_gated_delta_rule = kernel
    for name, each in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.gated_delta_rule", module)):
        monkeypatch.setitem(sys.modules, name, each)
    rows = pack(torch.zeros(2, 4, dtype=torch.long))
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that is not there
        counted = type(rows)(*(torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in rows))  # which it cannot do itself
        monkeypatch.setattr("gam_lm.ops.delta_rule_kernels.pack", lambda index: counted)
        x, gate = torch.empty(2, 4, 2, 8, device="cuda"), torch.empty(2, 4, 2, device="cuda")
        g, (D,) = fla_delta_memory(x, x, x, gate, gate, torch.empty(2, 8, 8, device="cuda"), index_BT=torch.empty(2, 4, dtype=torch.long, device="cuda"))
    assert calls == [((1, 8, 2, 8), {torch.bfloat16}, torch.float32, 3)] and g.shape == x.shape and D.shape == (2, 2, 8, 8)


def test_a_command_whose_kernel_cannot_run_says_so_in_one_line_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the river below the mill\n\n" * 200)
    sizes = ["--hidden-size", "16", "--num-hidden-layers", "1", "--vocab-size", "260", "--steps", "1", "--batch-size", "2", "--context", "16", "--device", "cpu"]
    assert run(["train", "--data", str(tmp_path / "text.txt"), "--gam.backend", "fla", *sizes, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "backend is 'fla' on cpu" in said and "use backend='torch'" in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_the_choice_is_said_once(caplog):
    _log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="gam_lm")
    config = ModelConfig(vocab_size=7, hidden_size=16, num_hidden_layers=3, mixers=("gam", "attention", "mamba"))
    for _ in range(2):
        new_model(config, 0)
    scan_backend = Mamba.automatic_backend(config, "cpu")
    assert [line for line in caplog.messages if " on cpu" in line] == ["delta rule: torch on cpu", "attention: sdpa on cpu", f"selective scan: {scan_backend} on cpu"]
