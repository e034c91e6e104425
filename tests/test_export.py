"""Graphs for other runtimes, and int8."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stacks import BASE, MIXED, WINDOWED, stack
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from gam_lm import LanguageModel, generate, load_model, save_model
from gam_lm.checkpoint import load_tokenizer_of
from gam_lm.cli.main import run
from gam_lm.errors import InputError
from gam_lm.export.graphs import trace, unflatten_state
from gam_lm.export.onnx import OnnxGraph, _solve_unit_lower
from gam_lm.export.operators import as_operators
from gam_lm.export.write import export
from gam_lm.inference.context import state_tensors
from gam_lm.inference.int8 import Int8Linear, quantize_int8
from gam_lm.mixers import attention, key_value_cache
from gam_lm.mixers.addresses import Addresses
from gam_lm.ops import delta_rule, delta_rule_kernels, number_formats

SMALL = {**BASE, "vocab_size": 270, "options": BASE["options"] | {"gated_deltanet": {"num_heads": 2, "chunk_size": 8}}}
STREAMED = ["gam-static", "gam-mean", "gam", "gam-slots", ("gam", "gated_deltanet"), WINDOWED, "transformer"]
"""What goes into one graph: every rule, and attention with and without a window."""

RULES = ["gam-static", "gam-mean", "gam-slots", "gam", "gated-deltanet", ("gam", "gated_deltanet")]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def model_of(rule="gam-static", **changes):
    """A model whose weights are large enough that every path matters."""
    model = LanguageModel(stack(rule, SMALL, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_directory(path, rule="gam-static", **changes):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat"] * 3, trainer)
    save_model(path, model_of(rule, vocab_size=tokenizer.get_vocab_size(), **changes), tokenizer)
    return path


@every_rule
def test_a_traced_program_equals_the_model_at_another_number_of_rows(rule):
    model = model_of(rule)
    graphs = trace(model)
    tokens = torch.randint(270, (3, 12))
    expected, last = model.stream(tokens)
    first = graphs.prefill_tokens or 10
    assert (graphs.prefill_tokens is None) == (rule == "gam-static")
    logits, state = graphs.prefill.module()(tokens[:, :first], state_tensors(model.initial_state(3)))
    torch.testing.assert_close(logits, expected[:, first - 1])
    for t in range(first, 12):
        logits, state = graphs.step.module()(tokens[:, t : t + 1], state)
        torch.testing.assert_close(logits, expected[:, t])
    assert len(state) == len(graphs.state_names)
    for ours, theirs in zip(state_tensors(unflatten_state(model, state)), state_tensors(last), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
def test_the_triangular_system_is_solved_by_products(size):
    A = torch.randn(3, 2, size, size, dtype=torch.float64).mul(0.3).tril(-1) + torch.eye(size, dtype=torch.float64)
    B = torch.randn(3, 2, size, 4, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(A, B, upper=False, unitriangular=True)
    torch.testing.assert_close(_solve_unit_lower(A, B, upper=False, unitriangular=True), expected, rtol=1e-9, atol=1e-9)


def test_learned_positions_bound_the_graph(tmp_path):
    folder = run_directory(tmp_path / "run", positions="learned", max_position_embeddings=12)
    done = export(folder, "torch", tmp_path / "out")
    assert done.largest_difference < 1e-5
    assert json.loads((tmp_path / "out" / "export.json").read_text())["last_position"] == 11


@pytest.mark.parametrize(("rule", "positions"), [("gam", 4), ("gam", 6), ("gam", 2), ("gam-static", 2), ("gam-static", 4)])
def test_as_many_steps_are_checked_as_learned_positions_hold(rule, positions, tmp_path):
    options = {"chunk_size": 4}  # a graph of 4 tokens, and 3 steps after it
    config = {"options": {**SMALL["options"], "gam": SMALL["options"].get("gam", {}) | options}}
    folder = run_directory(tmp_path / "run", rule, positions="learned", max_position_embeddings=positions, **(config if rule == "gam" else {}))
    assert export(folder, "torch", tmp_path / "out").largest_difference < 1e-5


@pytest.mark.parametrize("positions", [2, 5, 6])
def test_the_one_graph_is_traced_for_few_positions(positions):
    from gam_lm.export.stream import trace_stream

    for rule in ("gam", "transformer"):
        assert trace_stream(model_of(rule, positions="learned", max_position_embeddings=positions)).state_names[0] == "position"


def test_a_single_position_is_refused_by_graphs_and_not_by_int8(tmp_path):
    folder = run_directory(tmp_path / "run", positions="learned", max_position_embeddings=1)
    for format, portable in (("torch", False), ("onnx", True), ("onnx", False)):
        with pytest.raises(InputError, match="max_position_embeddings is 1"):
            export(folder, format, tmp_path / "out", portable=portable)
    assert export(folder, "int8", tmp_path / "out").largest_difference is not None


def test_only_an_earlier_export_is_replaced(tmp_path):
    folder, other = run_directory(tmp_path / "runs" / "run"), run_directory(tmp_path / "other")
    kept = sorted(other.iterdir())
    for format in ("int8", "torch", "onnx"):
        with pytest.raises(InputError, match=r"no earlier export \(it has no export\.json\)"):
            export(folder, format, other)
        with pytest.raises(InputError, match="which holds the run"):
            export(folder, format, tmp_path / "runs")
    assert sorted(other.iterdir()) == kept and (folder / "model.safetensors").is_file()
    out = tmp_path / "out"
    for format in ("int8", "torch", "int8"):
        export(folder, format, out)
        assert json.loads((out / "export.json").read_text())["format"] == format
    assert not (out / "step.pt2").exists()


def test_the_run_one_stands_in_is_exported_beside_it(tmp_path, monkeypatch):
    folder = run_directory(tmp_path / "run")
    (folder / "deeper").mkdir()
    for place, name in ((folder, "."), (folder / "deeper", "..")):
        monkeypatch.chdir(place)
        assert run(["export", name, "--format", "int8"]) == 0
        assert load_model(tmp_path / "run-int8") is not None


def test_only_an_earlier_page_is_replaced(tmp_path):
    folder = run_directory(tmp_path / "run")
    own = tmp_path / "thesis.html"
    own.write_text("<!doctype html><title>mine</title>")
    for out in (own, tmp_path):
        with pytest.raises(InputError, match=r"no page of an earlier export|ends in \.html|which holds"):
            export(folder, "page", out)
    with pytest.raises(InputError, match=r"ends in \.html"):
        export(folder, "page", tmp_path / "page.txt")
    assert "mine" in own.read_text() and not (tmp_path / "page.txt").exists()
    for _ in range(2):
        assert export(folder, "page", tmp_path / "page.html").bytes_after > 0


def test_a_torch_export_loads_without_this_library_and_holds_no_pickle(tmp_path):
    folder = run_directory(tmp_path / "run", "gam")
    assert run(["export", str(folder), "--format", "torch"]) == 0
    script = (
        "import sys, zipfile, torch\n"
        "archive = zipfile.ZipFile(sys.argv[1])\n"
        "assert not any(archive.read(name)[:1] == b'\\x80' or name.endswith('.pkl') for name in archive.namelist())\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "print('gam_lm' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run-torch" / "step.pt2")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.strip() == "False"


EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "the cat sat on the mat and on the cat"  # several blocks, and tokens that are left over


def written_by(command):
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=True).stdout


def continued(folder):
    """The prompt and 12 greedy tokens."""
    model, tokenizer = load_model(folder), load_tokenizer_of(folder)
    return PROMPT + tokenizer.decode(list(generate(model, tokenizer.encode(PROMPT).ids, max_new_tokens=12, temperature=0))) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("rule", STREAMED, ids=str)
def test_one_onnx_graph_equals_pytorch_at_every_length_and_the_example_writes_the_same_text(rule, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'gam-lm[export]'")
    folder, out = run_directory(tmp_path / "run", rule), tmp_path / "onnx"
    assert export(folder, "onnx", out).largest_difference < 2e-5
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "export.json", "model.onnx", "tokenizer.json"]
    assert str(Path(__file__).parent.parent).encode() not in (out / "model.onnx").read_bytes()
    assert written_by([sys.executable, EXAMPLES / "generate_onnx.py", out, PROMPT, 12]) == continued(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gam-static", "gam-mean", "gam"])
def test_portable_onnx_graphs_equal_pytorch_and_the_example_writes_the_same_text(rule, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'gam-lm[export]'")
    folder, out = run_directory(tmp_path / "run", rule), tmp_path / "onnx"
    assert export(folder, "onnx", out, portable=True).largest_difference < 1e-4
    assert written_by([sys.executable, EXAMPLES / "generate_onnx_portable.py", out, PROMPT, 12]) == continued(folder)


@pytest.mark.slow
def test_an_onnx_graph_in_int8_computes_what_the_int8_model_does(tmp_path, int8_widened):
    pytest.importorskip("onnxruntime", reason="pip install 'gam-lm[export]'")
    folder, out = run_directory(tmp_path / "run", "gam", hidden_size=128), tmp_path / "onnx"
    done = export(folder, "onnx", out, weights="int8")
    assert done.largest_difference < 5e-5 and done.bytes_after < 0.5 * done.bytes_before
    with torch.no_grad():
        expected = load_model(folder).eval()
        quantize_int8(expected)
        tokens = torch.randint(expected.config.vocab_size, (1, 20))
        logits, _ = OnnxGraph(out / "model.onnx")(tokens, state_tensors(expected.initial_state(1)))
        torch.testing.assert_close(logits, expected.stream(tokens)[0][:, -1], rtol=1e-4, atol=5e-5)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GAM_NODE_MODULES"), reason="GAM_NODE_MODULES names no node_modules with onnxruntime-node and @huggingface/tokenizers")
def test_the_example_in_javascript_writes_the_same_text(tmp_path):
    folder, out = run_directory(tmp_path / "run", "gam"), tmp_path / "onnx"
    export(folder, "onnx", out)
    (tmp_path / "node_modules").symlink_to(os.environ["GAM_NODE_MODULES"])
    shutil.copy(EXAMPLES / "generate_onnx.mjs", tmp_path)
    assert written_by(["node", tmp_path / "generate_onnx.mjs", out, PROMPT, 12]) == continued(folder)


@pytest.mark.slow
def test_an_export_is_timed_in_both_forms_and_gone_on_with(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="pip install 'gam-lm[export]'")
    small = ["--hidden-size", "16", "--num-hidden-layers", "1", "--vocab-size", "60", "--gam.chunk-size", "8", "--prompt-tokens", "11", "--rounds", "2"]
    command = ["bench-export", "--out", str(tmp_path / "out"), *small, "--device", "cpu"]
    assert run(command) == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["one graph", "portable"]
    assert all(min(row["export_seconds"], row["prompt_ms"], row["step_ms"], row["file_mb"]) > 0 and row["largest_difference"] < 1e-4 for row in rows)
    assert f"{rows[0]['prompt_ms']:.3g}"[:3] in table and (tmp_path / "out" / "table.md").read_text().strip() in table
    assert run(command) == 0 and json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows


def test_modules_have_their_own_functions_back_after_a_trace():
    before = delta_rule_kernels.delta_memory, attention.attend
    with as_operators():
        assert delta_rule_kernels.delta_memory is not before[0] and attention.attend is not before[1]
    assert (delta_rule_kernels.delta_memory, attention.attend) == before == (delta_rule.delta_memory, key_value_cache.attend)


@pytest.mark.parametrize("tied", [True, False])
@every_rule
def test_an_int8_run_loads_and_computes_what_its_integers_say(rule, tied, tmp_path, int8_widened):
    folder, out = run_directory(tmp_path / "run", rule, tie_word_embeddings=tied, initialization="scaled"), tmp_path / "int8"
    done = export(folder, "int8", out)
    assert 0 < done.largest_difference < 0.2
    small, plain = load_model(out), load_model(folder)
    assert (small.lm_head.weight_int8 is small.embed_tokens.weight_int8) == tied
    with torch.no_grad():
        for name, part in plain.named_modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                weight = small.get_submodule(name).weight
                step = part.weight.abs().amax(1, keepdim=True) / 127
                assert ((weight - part.weight).abs() <= 0.5001 * step).all()
                part.weight = nn.Parameter(weight)
            elif isinstance(part, Addresses) and part.plain:
                weight = small.get_submodule(name).address_SD()
                step = part.address.abs().amax(1, keepdim=True) / 127
                assert ((weight - part.address).abs() <= 0.5001 * step).all()
                part.address = nn.Parameter(weight)
    tokens = torch.randint(plain.config.vocab_size, (2, 20))
    torch.testing.assert_close(small(tokens)[0], plain(tokens)[0], rtol=1e-4, atol=1e-5)
    again = tmp_path / "again"
    save_model(again, small)
    assert torch.equal(load_model(again)(tokens)[0], small(tokens)[0])


def test_int8_takes_a_quarter_of_the_bytes_where_matrices_are_most(tmp_path):
    folder = run_directory(tmp_path / "run", hidden_size=128)
    done = export(folder, "int8", tmp_path / "int8")
    assert done.bytes_after < 0.3 * done.bytes_before


def test_the_command_line_measures_and_generates_from_int8(tmp_path, capsys):
    folder, out, text = run_directory(tmp_path / "run"), tmp_path / "int8", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the hat\n" * 2000)
    assert run(["export", str(folder), "--format", "int8", "--out", str(out), "--data", str(text)]) == 0
    said = capsys.readouterr().out
    assert "largest difference" in said
    step_before, step_after, *nats = (float(x) for x in re.findall(r"([\d.]+) ms|validation: ([\d.]+)|, ([\d.]+) after \(", said) for x in x if x)
    assert step_before > 0 and step_after > 0
    figures = []
    for each in (folder, out):
        assert run(["eval", str(each), "--data", str(text), "--context", "16", "--json", "--device", "cpu"]) == 0
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1])["valid_nats_per_token"])
    assert figures[0] != figures[1] and abs(figures[0] - figures[1]) < 0.05
    assert nats[1] - nats[0] == pytest.approx(figures[1] - figures[0], abs=0.02)  # blocks of another length
    assert run(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


@pytest.mark.parametrize("integers", [True, False])
def test_int8_keeps_bf16_and_bias(integers, monkeypatch):
    monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_INT8", integers)
    linear = nn.Linear(8, 3, dtype=torch.bfloat16)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    small = Int8Linear(linear)
    assert small(x).dtype == torch.bfloat16
    torch.testing.assert_close(small(x), linear(x), rtol=0.05, atol=0.05)


INTEGERS = pytest.mark.skipif(not number_formats.CPU_HAS_INT8, reason="no instructions for products of 8-bit integers")


@INTEGERS
@pytest.mark.parametrize("inputs", [1, 2, 7])
def test_products_of_narrow_matrices(inputs):
    linear = nn.Linear(inputs, 70, bias=False)
    small, x = Int8Linear(linear), torch.randn(3, inputs)
    torch.testing.assert_close(small(x), x @ small.weight.T, rtol=0, atol=0.02 * inputs)


@INTEGERS
def test_products_of_integers_are_those_of_the_rounded_numbers():
    linear = nn.Linear(300, 70, dtype=torch.float64)
    small, x = Int8Linear(linear), torch.randn(2, 5, 300, dtype=torch.float64) * torch.logspace(-6, 3, 5)[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / scale).round() * scale) @ small.weight.T + linear.bias
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    for row in range(5):  # a row's product does not know of the others: a text read at once and token by token gives the same
        assert torch.equal(small(x[:1, row : row + 1]), small(x)[:1, row : row + 1])
    assert small(torch.zeros(0, 300, dtype=torch.float64)).shape == (0, 70) and torch.equal(small(x[0, 0]), small(x)[0, 0])
    torch.testing.assert_close(small(torch.zeros(1, 300, dtype=torch.float64)), linear.bias[None])
    x[0, 1, 7] = torch.nan
    assert small(x)[0, 1].isnan().all() and small(x).isnan().sum() == 70


@INTEGERS
@torch.no_grad()
def test_rounding_what_is_multiplied_costs_no_more_than_rounding_the_weights(monkeypatch):
    model, tokens = model_of(), torch.randint(64, (4, 50))
    exact = model(tokens)[0]
    quantize_int8(model)
    errors = []
    for integers in (False, True):
        monkeypatch.setattr("gam_lm.ops.number_formats.CPU_HAS_INT8", integers)
        errors.append((model(tokens)[0] - exact).square().mean().sqrt())
    assert errors[0] < errors[1] < 2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_weight_changes_its_sign(dtype):
    weight = torch.randn(500, 8).to(dtype)
    linear = nn.Linear(8, 500, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(weight)
    small = Int8Linear(linear)
    assert (small.weight_int8.float() * weight.float() >= 0).all()
    assert (small.weight.float() - weight.float()).abs().max() < 0.02 * weight.abs().max()


def test_a_matrix_that_two_layers_share_stays_shared_wherever_the_model_goes(tmp_path):
    model = model_of("gam")
    quantize_int8(model)
    save_model(tmp_path, model)
    for made in (model.to(torch.bfloat16), copy.deepcopy(model).double(), load_model(tmp_path, dtype=torch.bfloat16), copy.deepcopy(model).to("meta")):
        assert made.lm_head.weight_int8 is made.embed_tokens.weight_int8 and made.lm_head.weight_scale is made.embed_tokens.weight_scale
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight_int8 is copied.embed_tokens.weight_int8 is not model.embed_tokens.weight_int8
    copied.lm_head.to(torch.float64)  # alone
    assert copied.lm_head.weight_scale.dtype == torch.float64 and copied.embed_tokens.weight_scale.dtype == torch.bfloat16
    assert sorted(copied.state_dict()) == sorted(model.state_dict())


def test_what_cannot_be_exported_is_named(tmp_path):
    for name in ("transformer", WINDOWED, MIXED):
        folder = run_directory(tmp_path / name, name)
        with pytest.raises(InputError, match="the graph of .*Attention.* depends on the length of the text"):
            export(folder, "onnx", tmp_path / "out", portable=True)
    with pytest.raises(InputError, match="the graph of .*Mamba.* depends on the length of the text"):
        export(folder, "onnx", tmp_path / "out")
    for asked, said in ((("torch", False, "int8"), "weights is 'int8'"), (("torch", True, None), "portable is given"), (("page", False, "fp32"), "int8 or fp16")):
        with pytest.raises(InputError, match=said):
            export(folder, asked[0], tmp_path / "out", portable=asked[1], weights=asked[2])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="the run itself"):
        export(folder, "int8", folder)
    export(folder, "int8", tmp_path / "int8")
    with pytest.raises(InputError, match="int8 already"):
        export(tmp_path / "int8", "int8", tmp_path / "again")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="quant_method 'gptq'"):
        load_model(tmp_path / "int8")
    for odd in ("gam_int8", 8, [1], True):
        (tmp_path / "int8" / "config.json").write_text(json.dumps(config | {"quantization_config": odd}))
        with pytest.raises(InputError, match="quantization_config is .*, which is no object"):
            load_model(tmp_path / "int8")


@pytest.mark.parametrize(("name", "address"), [("gam-static", 0), ("gam", 0), ("gam-slots", 2)])
def test_a_quantised_model_keeps_no_matrix_but_learned_slots_in_fp32(name, address):
    model = model_of(name)
    quantize_int8(model)
    assert not any(isinstance(part, nn.Linear | nn.Embedding) for part in model.modules())
    assert sum(name.endswith("written.address") for name, _ in model.named_parameters()) == address
