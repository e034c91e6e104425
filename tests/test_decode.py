"""Decoding: caches written in place, the compiled step, what a row says, runs that end badly, table and plots."""

import json

import pytest
import torch
import torch._inductor.config  # reads CXX once, before a test changes it
import torch.nn.functional as F
from stacks import BASE as SMALL
from stacks import MIXED, STACKS, WINDOWED, stack

import gam_lm.experiments.decode as decode
from gam_lm.cli.main import run
from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import POSITION_BYTES, model_cost
from gam_lm.errors import InputError
from gam_lm.experiments.decode import GPT2, Protocol, bench_decode, weight_bytes
from gam_lm.experiments.models import contender
from gam_lm.inference.compiling import compiled_step, obstacle, why_not_decoding
from gam_lm.inference.int8 import quantize_int8
from gam_lm.mixers.key_value_cache import attend_one
from gam_lm.model import LanguageModel, State
from gam_lm.ops import number_formats
from gam_lm.ops.row_products import MAX_ROWS, row_backend
from gam_lm.presets.models import named_model
from gam_lm.report.decode import decode_table, write_decode
from gam_lm.results import Results

BASE = SMALL | {"vocab_size": 64}
MODELS = ["gam-static", "gam-mean", "gam", "gam-hybrid", "transformer-learned", "transformer", "mamba"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bf16_is_measured(monkeypatch):
    """Also on a processor that only emulates it: times do not matter here."""
    monkeypatch.setattr("gam_lm.experiments.measuring.has_bf16", lambda device: True)


def opened(path):
    return Results.open(path / "results.json", command="", environment={}, corpus=None)


def model_of(name, **changes):
    torch.manual_seed(1)
    return LanguageModel(stack(name, BASE, max_position_embeddings=64).replace(**changes)).eval()


@pytest.mark.parametrize("name", ["transformer-learned", "transformer", "llama", "gam-attention", "transformer+conv_kernel_size=3", MIXED])
@torch.no_grad()
def test_a_cache_written_in_place_gives_what_a_growing_one_gives(name):
    model = model_of(name).double()
    n, B = 9, 3
    filled = [layer.mixer.filled_cache(B, n, 4, dtype=torch.float64) for layer in model.layers]
    _, read = model.stream(torch.randint(64, (B, n)))
    in_place = State(read.position_B, tuple(layer if cache is None else cache for cache, layer in zip(filled, read.layers, strict=True)))

    def cut(layer):
        """The same as a cache that grows: without the room, and without the fourth tensor, the place."""
        at = next(i for i, each in enumerate(layer) if each.dtype == torch.bool)
        return (*layer[: at - 2], *(each[:, :n] for each in layer[at - 2 : at + 1]), *layer[at + 2 :])

    grows = State(read.position_B, tuple(layer if cache is None else cut(layer) for cache, layer in zip(filled, in_place.layers, strict=True)))
    assert any(cache is not None for cache in filled)
    places = [each.data_ptr() for layer in in_place.layers for each in layer if each.dim() == 4 and each.shape[1] == n + 4]
    for _ in range(4):
        token_B1 = torch.randint(64, (B, 1))
        got, in_place = model.stream(token_B1, in_place)
        wanted, grows = model.stream(token_B1, grows)
        assert (got - wanted).abs().max() < 1e-12
    assert places == [each.data_ptr() for layer in in_place.layers for each in layer if each.dim() == 4 and each.shape[1] == n + 4] != []


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_attention_of_one_token_is_attention(dtype, tolerance):
    q, k, v = (torch.randn(2, tokens, 3, 4, dtype=dtype) for tokens in (1, 11, 11))
    own_BS = torch.tensor([[True] * 11, [False] * 4 + [True] * 7])
    wanted = torch.nn.functional.scaled_dot_product_attention(*(each.double().transpose(1, 2) for each in (q, k, v)), attn_mask=own_BS[:, None, None])
    wanted = wanted.transpose(1, 2)
    got = attend_one(q, k, v, own_BS)
    assert got.dtype is dtype and (got - wanted).abs().max() < tolerance


def test_only_a_state_that_grows_is_filled():
    def grows(name, tokens):
        return model_cost(stack(name), 2 * tokens).state_bytes > model_cost(stack(name), tokens).state_bytes

    names = [*MODELS, "gam-attention", "llama", *STACKS]
    filled = [name for name in names if any(layer.mixer.filled_cache(1, 5, 1, dtype=torch.float32) is not None for layer in model_of(name).layers)]
    assert filled == [name for name in names if grows(name, 100)] and WINDOWED not in filled
    assert {"transformer", "transformer-learned", MIXED} <= set(filled)
    assert why_not_decoding(model_of(MIXED)) == "the state of Attention grows with every token"
    assert why_not_decoding(model_of(WINDOWED)) == obstacle(CPU)


def test_the_bytes_of_the_weights_are_those_that_a_token_reads():
    model = model_of("gam-static", positions="learned")
    counted = sum(p.numel() for p in model.parameters()) - model.embed_positions.weight.numel()
    assert weight_bytes(model) == 4 * counted
    untied = model_of("gam-static", tie_word_embeddings=False)
    assert weight_bytes(untied) == 4 * counted  # one matrix for the output head, the embedding is looked up
    quantize_int8(untied)
    parts = [part for name, part in untied.named_modules() if hasattr(part, "weight_int8") and "embed" not in name]
    matrices, scales = (sum(each.numel() for each in some) for some in zip(*((part.weight_int8, part.weight_scale) for part in parts), strict=True))
    assert weight_bytes(untied) == matrices + 4 * (scales + counted - matrices)


@pytest.mark.slow
def test_a_row_for_every_model_context_and_setting_and_none_twice(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    settings = [("fp32", "eager"), ("bf16", "eager"), ("int8", "eager")]
    arguments = ([*MODELS, GPT2], [5, 20], [1, 2], settings, BASE, Protocol(steps=2, warmup=1))
    monkeypatch.setattr(decode, "memory_bandwidth", lambda device: 1e9)
    bench_decode(*arguments, opened(tmp_path), CPU, isolated=False)
    rows = opened(tmp_path).rows
    assert len(rows) == 2 * 2 * (3 * len(MODELS) + 2)  # GPT-2 has no int8
    assert all(row["outcome"] == "ok" and row["step_ms_low"] <= row["step_ms"] <= row["step_ms_high"] for row in rows)
    most = {"fp32": 1e-5, "bf16": 0.1, "int8": 0.2}
    for row in rows:
        assert row["model"] == GPT2 or all(0 < row[key] < most[row["dtype"]] for key in ("output_error", "state_error")), (row["model"], row["dtype"])
        config = ModelConfig.from_dict(row["model_config"])
        assert config.num_hidden_layers == 2 or row["model"] in {"mamba", GPT2}  # whose depth is chosen to match the size
        width = {"fp32": 4, "bf16": 2, "int8": 4 if row["model"] == "gam-static" else 2}[row["dtype"]] * 16  # int8 embeddings give fp32
        if row["model"] == GPT2:
            assert row["state_bytes"] == row["context"] * 2 * config.num_hidden_layers * width  # keys and values
        elif config.mixers == ("attention",):
            assert row["context"] * 4 * width <= row["state_bytes"] <= row["context"] * (4 * width + 2) + 48  # whose a token is, and counts
        elif row["model"] == "gam-static":
            assert row["state_bytes"] == 2 * 2 * width  # two inputs of a convolution of three taps
        elif row["dtype"] == "fp32":
            assert row["state_bytes"] == model_cost(config, row["context"]).state_bytes - POSITION_BYTES
    monkeypatch.setattr(decode, "_measure", None)
    bench_decode(*arguments, opened(tmp_path), CPU, isolated=False)  # nothing is left to measure


def test_models_are_of_one_size_whatever_their_positions_need():
    configs = {name: decode._config(name, BASE, 100_046) for name in (*MODELS, GPT2)}
    assert configs["transformer-learned"].max_position_embeddings == configs[GPT2].max_position_embeddings == 100_046
    for name in ("transformer-learned", GPT2):
        _, matched = contender(name, BASE, match=True)
        assert configs[name].replace(max_position_embeddings=matched.max_position_embeddings) == matched
    assert decode._row(GPT2, configs[GPT2], torch.device("cpu"), 5, "fp32", "eager", 1)["backend"] == "transformers-sdpa"
    with pytest.raises(InputError, match="hf:gpt2"):
        decode._config("hf:gpt3", BASE, 5)


@torch.no_grad()
def test_a_stack_of_caches_and_memories_decodes_after_any_context(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "memory_bandwidth", lambda device: 1e9)
    mixed = {**BASE, "mixers": ["gam", "attention"]}
    monkeypatch.setattr(
        decode, "contender", lambda name, base, match: (name, stack(("gam", "attention"), mixed) if name == "mixed" else named_model(name, base))
    )
    bench_decode(
        ["mixed", "gam-hybrid"], [5, 2000], [2], [("fp32", "eager")], BASE, Protocol(steps=1, warmup=1), opened(tmp_path), CPU, isolated=False
    )
    for row in opened(tmp_path).rows:
        expected = model_cost(ModelConfig.from_dict(row["model_config"]), row["context"]).state_bytes - POSITION_BYTES
        assert row["outcome"] == "ok" and row["state_bytes"] == pytest.approx(expected, abs=8)  # of a count, a share is taken


@pytest.mark.slow
def test_a_context_that_runs_out_of_memory_is_a_row_and_the_shorter_ones_are_measured(tmp_path):
    # 10⁷ tokens × 16 channels × keys and values in fp32 are 1.3 GB.
    protocol = Protocol(steps=1, warmup=1, limit_mb=1000)
    bench_decode(["transformer"], [16, 10_000_000], [1], [("fp32", "eager")], BASE | {"num_hidden_layers": 1}, protocol, opened(tmp_path), CPU)
    assert {row["context"]: row["outcome"] for row in opened(tmp_path).rows} == {16: "ok", 10_000_000: "out of memory"}


def test_without_a_compiler_the_compiled_rows_are_left_out_with_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decode, "memory_bandwidth", lambda device: 1e9)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in obstacle(CPU)
    bench_decode(
        ["gam"], [5], [1], [("fp32", "eager"), ("fp32", "compiled")], BASE, Protocol(steps=1, warmup=1), opened(tmp_path), CPU, isolated=False
    )
    assert [row["variant"] for row in opened(tmp_path).rows] == ["eager"]
    assert sum("no-such-compiler" in record.message for record in caplog.records) == 1


@pytest.mark.slow
@pytest.mark.skipif(obstacle(CPU) is not None, reason="no compiler")
@torch.no_grad()
def test_the_compiled_step_takes_rows_and_states_of_other_shapes():
    model = model_of("gam-static")
    _, one = model.stream(torch.randint(64, (1, 7)))
    step = compiled_step(model, torch.zeros(1, 1, dtype=torch.long), one)
    _, two = model.stream(torch.randint(64, (2, 7)))
    strided = State(two.position_B, tuple(tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in layer) for layer in two.layers))
    for state in (one, two, strided, one):
        token_B1 = torch.randint(64, (len(state.position_B), 1))
        (got, after), (wanted, expected) = step(token_B1, state), model.stream(token_B1, state)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.layers, expected.layers, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(obstacle(CPU) is not None, reason="no compiler")
@pytest.mark.parametrize(
    ("name", "B"),
    [
        ("gam-static", 1),
        ("gam-mean", 1),
        ("mamba", 1),
        ("transformer", 2),
        ("gam", MAX_ROWS + 1),
        ("gated-deltanet", 1),
        (WINDOWED, 1),
        (MIXED, 2),
        ("int8", 1),
        ("int8", MAX_ROWS + 1),
        ("int8, widened", 1),
        ("int8, matrix unit", 1),
    ],
)
@torch.no_grad()
def test_the_compiled_step_gives_what_the_model_gives(name, B, monkeypatch):
    model = model_of("gam" if "int8" in name else name)
    if "int8" in name:
        monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_INT8", number_formats.CPU_HAS_INT8 and name != "int8, widened")
        monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_INT8_TILES", name == "int8, matrix unit")
        quantize_int8(model)
    token_B1 = torch.randint(64, (B, 1))
    filled = [layer.mixer.filled_cache(B, 7, 8, dtype=torch.float32) for layer in model.layers]
    _, read = model.stream(torch.randint(64, (B, 7)))
    state = State(read.position_B, tuple(layer if cache is None else cache for cache, layer in zip(filled, read.layers, strict=True)))
    step = compiled_step(model, token_B1, state)
    if name == "int8, matrix unit":  # the compiled step widens, the model would not
        monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_INT8", False)
    copy = State(state.position_B, tuple(tuple(each.clone() for each in layer) for layer in state.layers))
    for _ in range(3):
        token_B1 = torch.randint(64, (B, 1))
        with torch.compiler.set_stance("fail_on_recompile"):  # what is compiled later is compiled otherwise
            got, state = step(token_B1, state)
        wanted, copy = model.stream(token_B1, copy)
        assert (got - wanted).abs().max() < 1e-5


@pytest.mark.skipif(obstacle(CPU) is not None, reason="no compiler")
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_products_of_few_rows_as_loops_are_the_products(dtype, near):
    def products(x_RI, weight_OI, bias_O):
        return [
            y
            for R in range(1, MAX_ROWS + 2)
            for y in (F.linear(F.gelu(x_RI[:R]), weight_OI), F.linear(x_RI[:R], weight_OI, bias_O), x_RI[-R:] @ weight_OI.T)
        ]

    inputs = [torch.randn(*shape, dtype=dtype) for shape in ((MAX_ROWS + 1, 32), (24, 32), (24,))]
    wanted, got = products(*inputs), torch.compile(products, backend=row_backend, dynamic=False)(*inputs)
    torch.testing.assert_close(got, wanted, rtol=near, atol=near * 10)


MACHINE = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}


def cell(model, n, outcome="ok", **figures):
    row = {"model": model, "context": n, "batch_size": 1, "dtype": "bf16", "variant": "compiled", "outcome": outcome}
    if outcome == "ok":
        row |= {"parameters": 1000, "step_ms": 2.0, "bandwidth": 4e10, "share_of_bandwidth": 0.8, "state_bytes": 2048} | figures
    return row


def test_table_and_plots_show_every_model_and_what_failed(tmp_path):
    rows = [cell("gam-static", n, step_ms=2 + n / 1e6) for n in (1000, 100_000)]
    rows += [cell("transformer", 1000, state_bytes=4_096_000), cell("transformer", 100_000, "out of memory")]
    (tmp_path / "results.json").write_text(json.dumps({"command": "", "environment": MACHINE, "corpus": None, "rows": rows}))
    table = write_decode(tmp_path)
    lines = [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert lines[2] == ["gam-static", "1,000", "2.00", "2.10", "1.05", "80 %", "2", "2"]
    assert lines[3] == ["transformer", "1,000", "2.00", "out of memory", "", "80 %", "4,000", ""]
    assert "### batch 1, bf16 weights, compiled" in table
    assert "transformer (out of memory)" in (tmp_path / "decode.svg").read_text() and (tmp_path / "decode.png").stat().st_size
    two = decode_table({"environment": MACHINE, "rows": [*rows, cell("gam-static", 1000) | {"batch_size": 16}]})
    assert two.count("### ") == 2


def test_the_command_measures_in_processes_of_their_own(tmp_path, capsys):
    sizes = ["--hidden-size", "16", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--steps", "2", "--warmup", "1"]
    command = [
        "bench-decode", "--models", "gam-static", "gam-hybrid", "--contexts", "5", "9", "--batch-sizes", "1", "--precisions", "fp32", "--variants", "eager",
        "--device", "cpu", "--out", str(tmp_path / "out"), *sizes,
    ]  # fmt: skip
    assert run(command) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["model"], row["context"], row["outcome"]) for row in rows] == [
        (name, n, "ok") for name in ("gam-static", "gam-hybrid") for n in (5, 9)
    ] and "gam-static" in capsys.readouterr().out
    assert run([*command, "--contexts", "0"]) == 2
