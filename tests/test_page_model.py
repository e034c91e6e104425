"""The model outside PyTorch: in one file of numpy, and in JavaScript as the exported page runs it."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import model_of, run_directory

from gam_lm import generate, load_model
from gam_lm.checkpoint import load_tokenizer_of
from gam_lm.cli.main import run
from gam_lm.data.tokenizer import literal, train_bpe, train_paper
from gam_lm.errors import InputError
from gam_lm.export.page import byte_level_bpe, packed, write_page
from gam_lm.inference.int8 import quantize_int8

ROOT = Path(__file__).parent.parent
BROWSER = ROOT / "src/gam_lm/export/browser"

VARIANTS = {
    "gam": {}, "gam-slots": {}, "gam-mean": {}, "gam-static": {}, "gam-paper": {"max_position_embeddings": 40},
    "gam+static_path=true": {"mlp": "swiglu", "norm": "rms", "tie_word_embeddings": False}, "gam+fusion=global+keep_gate=true": {"hidden_size": 24},
    "gam-mean+fusion=sum": {}, "gam-static+fusion=local": {"stack": "bare"}, "gam+max_write=2": {"intermediate_size": 0}, "gam+write_gate=closed": {},
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]


def numpy_model(folder):
    spec = importlib.util.spec_from_file_location("gam_numpy", ROOT / "examples" / "gam_numpy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GAM(folder)


@every_variant
def test_the_file_of_numpy_equals_pytorch_in_fp64(name, tmp_path):
    folder = run_directory(tmp_path / "run", name, **VARIANTS[name])
    model = numpy_model(folder)
    ours = np.stack([model.step(token) for token in TOKENS])
    with torch.no_grad():
        expected = load_model(folder).double().stream(torch.tensor([TOKENS]))[0][0]
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-9, atol=1e-9)


node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the browser tests run the same code")


def in_node(folder, script, given):
    """What ``script`` makes of ``given``, with GAM and BPE at hand and files in ``folder``."""
    code = (
        f"const fs = require('fs'), GAM = require({json.dumps(str(BROWSER / 'step.js'))}), BPE = require({json.dumps(str(BROWSER / 'tokenizer.js'))}),"
        f"Sources = require({json.dumps(str(BROWSER / 'sources.js'))});"
        "const given = JSON.parse(fs.readFileSync(0, 'utf8'));"
        "function model() { const blob = fs.readFileSync('blob'); const bytes = blob.buffer.slice(blob.byteOffset, blob.byteOffset + blob.length);"
        " return new GAM.Model(given.config, GAM.unpack(bytes, given.tensors)); }"
        f"console.log(JSON.stringify((() => {{ {script} }})()));"
    )
    done = subprocess.run(["node", "-e", code], input=json.dumps(given), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def given(folder, model, *, half=False):
    blob, tensors = packed(model, half=half)
    (folder / "blob").write_bytes(blob)
    return {"config": model.config.to_dict(), "tensors": tensors, "ids": TOKENS}


@node
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 4), (7, 12), (272, 64), (8, 5), (36, 128)])
def test_the_product_in_webassembly_equals_the_plain_one(rows, columns, narrow, tmp_path):
    script = (
        f"const {{ plain, room }} = require({json.dumps(str(BROWSER / 'product.js'))}), {{ buffer, product }} = room(16 + 4 * given.W.length, given.W.length);"
        "const W = new (given.scale ? Int8Array : Float32Array)(buffer, 16, given.W.length), x = Float64Array.from(given.x);"
        "W.set(given.W); W.scale = given.scale;"
        "return [[...product(W, x, given.rows)], [...plain(W, x, given.rows)], product !== plain];"
    )
    W, x, scale = torch.randn(rows, columns), torch.randn(columns), torch.rand(rows) if narrow else None
    if narrow:
        W = (50 * W).round().clamp(-127, 127)
    values = {"W": W.flatten().tolist(), "x": x.tolist(), "rows": rows, "scale": None if scale is None else scale.tolist()}
    ours, plain, another = in_node(tmp_path, script, values)
    assert another
    for each in (ours, plain):
        torch.testing.assert_close(torch.tensor(each), W @ x * (1 if scale is None else scale), rtol=1e-5, atol=1e-4)


STEPS = "const made = model(); return given.ids.map((id) => [...made.step(id)]);"


@node
@every_variant
def test_the_model_in_javascript_equals_pytorch(name, tmp_path):
    torch.manual_seed(0)
    model = model_of(name, **VARIANTS[name])
    with torch.no_grad():
        expected = model.stream(torch.tensor([TOKENS]))[0][0]
    torch.testing.assert_close(torch.tensor(in_node(tmp_path, STEPS, given(tmp_path, model))), expected, rtol=1e-5, atol=2e-5)


@node
@pytest.mark.parametrize("weights", ["int8", "fp16"])
def test_packed_weights_give_the_logits_of_the_packed_model(weights, tmp_path, int8_widened):
    torch.manual_seed(0)
    model = model_of("gam", hidden_size=64)
    if weights == "int8":
        quantize_int8(model)
    logits = torch.tensor(in_node(tmp_path, STEPS, given(tmp_path, model, half=weights == "fp16")))
    with torch.no_grad():
        if weights == "fp16":
            assert (logits - model.stream(torch.tensor([TOKENS]))[0][0]).abs().max() < 2e-2  # what fp16 costs
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter.half().float())
        torch.testing.assert_close(logits, model.stream(torch.tensor([TOKENS]))[0][0], rtol=1e-5, atol=1e-4)


@node
@pytest.mark.parametrize("name", ["gam", "gam-slots", "gam-mean", "gam-static"])
def test_silent_slots_and_heads_are_as_pytorch_takes_them_out(name, tmp_path):
    torch.manual_seed(0)
    model = model_of(name)
    S = 8
    silent = torch.zeros(2, S, dtype=torch.bool)
    silent[0, : S // 2], silent[1, 5] = True, True  # a whole head of the written memory, and one slot
    script = (
        "const made = model(); given.silent.forEach((each, i) => { made.silent[i] = Uint8Array.from(each, Number); });"
        "return given.ids.map((id) => [...made.step(id)]);"
    )
    logits = torch.tensor(in_node(tmp_path, script, given(tmp_path, model) | {"silent": silent.tolist()}))
    for layer, mask in zip(model.layers, silent, strict=True):
        (layer.mixer.written or layer.mixer.memory).silent_M = mask
    with torch.no_grad():
        torch.testing.assert_close(logits, model.stream(torch.tensor([TOKENS]))[0][0], rtol=1e-5, atol=2e-5)


@node
@pytest.mark.parametrize("name", ["gam", "gam-slots", "gam-mean"])
@pytest.mark.parametrize("most", [256, 10])
def test_sources_in_javascript_are_those_of_the_trace(name, most, tmp_path):
    torch.manual_seed(0)
    model = model_of(name)
    script = (
        "const made = model(), sources = made.layers.map((_, i) => new Sources(made, i, given.most));"
        "return given.ids.map((id) => { made.step(id); return sources.map((each, i) => each.update(made.layers[i].seen)); });"
    )
    found = in_node(tmp_path, script, given(tmp_path, model) | {"most": most})
    traces = []
    for layer in model.layers:
        layer.mixer.register_forward_hook(lambda module, inputs, _: traces.append(module.trace(inputs[0], inputs[1])))
    with torch.no_grad():
        model.stream(torch.tensor([TOKENS]))
    for number, trace in enumerate(traces):
        whole_TX = torch.cat([trace.sources_BTI[0], trace.bank_BT[0, :, None]], 1)
        for t, layers in enumerate(found):
            ours, kept = layers[number], [each["index"] for each in layers[number]["tokens"]]
            assert kept == list(range(max(0, t + 1 - most), t + 1))
            shares = torch.tensor([each["share"] for each in ours["tokens"]] + [ours["bank"]])
            wanted = torch.cat([whole_TX[t, kept], whole_TX[t, -1:]])
            torch.testing.assert_close(shares / shares.sum(), wanted / wanted.sum(), rtol=1e-4, atol=1e-5)
            assert ours["older"] == 0 if t < most else ours["older"] > 0
            assert sum(each["share"] for each in ours["tokens"]) + ours["bank"] + ours["older"] == pytest.approx(1)


TEXTS = [
    "\ufeffa mark at the start", "\n\ta line first",
    "", "the cat sat on the mat", "  two  spaces and\n\n\tlines \n", "it's we'll I'D they've", "naïve café — “quotes” 東京タワー 🙂👩‍👩‍👧 ½ ٣",
    "a\u00a0b\u2003c\u3000d\x85e\ufefff\u200bg",
    "<|endoftext|> is text here", "x" * 200, "3.14159 and 1,000,000", "\x00\x01\x7f\xad",
]  # fmt: skip


@node
@pytest.mark.parametrize("prefix", [False, True])
def test_the_tokenizer_in_javascript_encodes_and_decodes_like_ours(prefix, tmp_path):
    tokenizer = literal(train_bpe([path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))], 1200))
    tokenizer.pre_tokenizer.add_prefix_space = prefix
    rng = random.Random(0)
    alphabet = [chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x3000), rng.randrange(0x1F300, 0x1F700)))) for _ in range(400)] + [" ", " ", "\n"]
    texts = TEXTS + ["".join(rng.choices(alphabet, k=60)) for _ in range(100)] + [(ROOT / "README.md").read_text(encoding="utf-8")]
    script = "const made = new BPE.Tokenizer(given.tokenizer); return given.texts.map((text) => { const ids = made.encode(text); return [ids, made.decode(ids)]; });"
    for text, (ids, back) in zip(texts, in_node(tmp_path, script, {"tokenizer": byte_level_bpe(tokenizer), "texts": texts}), strict=True):
        assert ids == tokenizer.encode(text).ids, text
        assert back == (text if not prefix or not text or text.startswith(" ") else f" {text}")


def test_what_the_page_cannot_run_is_named(tmp_path):
    for name, said in (("transformer", "gam with memory='bank' alone"), ("gam-attention", "gam with memory='bank' alone")):
        with pytest.raises(InputError, match=said):
            write_page(run_directory(tmp_path / name, name), tmp_path / "page.html")
    with pytest.raises(InputError, match="byte-level BPE alone"):
        byte_level_bpe(train_paper(["the cat"], 40))
    folder = run_directory(tmp_path / "run")
    assert run(["export", str(folder), "--format", "int8"]) == 0
    with pytest.raises(InputError, match="the run is in int8"):
        write_page(tmp_path / "run-int8", tmp_path / "page.html", "fp16")
    assert not (tmp_path / "page.html").exists()
    (tmp_path / "folder").mkdir()
    assert run(["export", str(folder), "--format", "page", "--out", str(tmp_path / "folder")]) == 2


def test_the_file_of_numpy_generates_from_the_command_line(tmp_path):
    folder = run_directory(tmp_path / "run", "gam")
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "gam_numpy.py"), str(folder), "the cat", "5"], capture_output=True, text=True, check=True)
    model, tokenizer = load_model(folder), load_tokenizer_of(folder)
    new = list(generate(model, tokenizer.encode("the cat").ids, max_new_tokens=5, temperature=0))
    assert done.stdout == "the cat" + tokenizer.decode(new) + "\n"
