"""What is fuzzed, kind by kind: a strategy that makes inputs, and a check that one input ends in a result or in one line.

A check returns whether the input was used; anything that it lets through but an answer or an InputError is a finding.
"""

import contextlib
import io
import json
import math
import shutil
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from data_inputs import data_files, folder, folders, outcome, tokenizer_file
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gam_lm import LanguageModel, ModelConfig, save_model
from gam_lm.checkpoint import load_model, load_tensors, load_tokenizer_of
from gam_lm.cli.flag_list import flags_of
from gam_lm.cli.main import VERBS, parse, verb_class
from gam_lm.cli.numbers import check_numbers
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.report.page import report_markdown
from gam_lm.report.verdict import compare
from gam_lm.results import Results, read_results, write_blocks
from gam_lm.training.directory import trained_with
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trackers import NoTracker


@dataclass(frozen=True)
class Kind:
    """A kind of input."""

    inputs: st.SearchStrategy[Any]
    check: Any
    """Of one input: whether it was used, False where it was refused in one line. Raises for a finding."""


def in_one_line(work):
    """Whether ``work`` gave a result; False for one line of an InputError."""
    try:
        work()
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 2000, said
        return False
    return True


SPECIAL = st.sampled_from([None, True, 0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 0.0, -0.0, 0.5, 1e-40, 1e308, math.nan, math.inf, -math.inf,
                           "", "gam", "1", "\0", "\ud800", [], {}, [1], {"a": 1}])  # fmt: skip
VALUES = st.recursive(
    SPECIAL | st.integers() | st.floats() | st.text(max_size=8) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def places(value, place=()):
    """The way to every value of nested JSON."""
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*place, key))


@st.composite
def damaged(draw, whole):
    """JSON of which none to three values are others, are missing, or have another name."""
    value = json.loads(json.dumps(draw(whole) if isinstance(whole, st.SearchStrategy) else whole))
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(value))[1:]
        if not found:
            break
        *way, last = found[draw(st.integers(0, len(found) - 1))]
        holder = value
        for key in way:
            holder = holder[key]
        how = draw(st.sampled_from(["other", "other", "missing", "named"]))
        if how == "other":
            holder[last] = deepcopy(draw(VALUES))  # a later round may change it
        else:
            old = holder.pop(last)
            if how == "named" and isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = old
    return value


@st.composite
def damaged_bytes(draw, raw):
    """Bytes of which some are others, are missing at the end, or come on top."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(0, 3))):
        raw[draw(st.integers(0, len(raw) - 1))] ^= draw(st.integers(1, 255))
    return bytes(raw[: len(raw) - draw(st.sampled_from([0, 0, 1, 7, 50, len(raw)]))] + draw(st.sampled_from([b"", b"", b"\0", b"}", b"\xff" * 9])))


# Configurations -------------------------------------------------------------------------------------------------------------------------------------

CONFIGS = [
    ModelConfig(vocab_size=40, hidden_size=16, mixers=mixers).to_dict() | {"model_type": "gam", "architectures": ["GAMForCausalLM"]}
    for mixers in (("gam",), ("gam", "attention"), ("mamba",), ("gated_deltanet",))
]


def configuration(values):
    def work():
        config = ModelConfig.from_dict(values)
        assert ModelConfig.from_dict(config.to_dict()) == config

    return in_one_line(work)


def recipe(values):
    def work():
        made = TrainConfig.from_dict(values)
        assert TrainConfig.from_dict(made.to_dict()) == made
        rates = [made.rate(step, 100) for step in (0, 50, 99)]
        assert all(0 <= rate <= made.learning_rate for rate in rates)

    return in_one_line(work)


# Files of a run -------------------------------------------------------------------------------------------------------------------------------------


@cache
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["the cat sat"], trainers.BpeTrainer(vocab_size=260, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False))
    return made


RECIPE = TrainConfig(steps=2, batch_size=2, context=8, warmup_steps=1, precision="fp32", checkpoint_every=1, validate_every=1, ema=0.5)


@cache
def workshop():
    """A folder with a prepared text, a run that ended and one that was interrupted after its first step."""
    folder = Path(tempfile.mkdtemp(prefix="gam-fuzz-"))
    text = folder / "text"
    text.mkdir()
    for split, count in (("train", 30), ("valid", 4)):
        (text / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"alpha beta {i} gamma"}) + "\n" for i in range(count)))
    corpus = prepare(str(text), vocab_size=260, cache=folder / "cache")
    config = ModelConfig(vocab_size=corpus.vocab_size, hidden_size=8, num_hidden_layers=1)
    fit(new_model(config, 0), corpus, RECIPE, folder / "ended")

    class Stopping(NoTracker):
        def log(self, figures, step):
            if step == 2:
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit(new_model(config, 0), corpus, RECIPE, folder / "stopped", tracker=Stopping())
    assert list((folder / "stopped" / "state").iterdir())
    return folder, corpus, config


@cache
def run_files(name):
    """The files of a run as bytes."""
    run = workshop()[0] / name
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith(".")}


@st.composite
def damaged_run(draw, name):
    """A run directory in which one file is damaged, as JSON or as bytes, or is missing, or is a folder."""
    files = run_files(name)
    path = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(["json", "json", "bytes", "bytes", "missing", "folder"]))
    if how == "json" and path.endswith(".json"):
        return path, json.dumps(draw(damaged(json.loads(files[path])))).encode()
    if how in ("missing", "folder"):
        return path, how
    return path, draw(damaged_bytes(files[path]))


@contextlib.contextmanager
def with_damage(name, damage):
    path, content = damage
    with tempfile.TemporaryDirectory(dir=workshop()[0]) as place:
        run = Path(place) / "run"
        shutil.copytree(workshop()[0] / name, run)
        (run / path).unlink()
        if content == "folder":
            (run / path).mkdir()
        elif content != "missing":
            (run / path).write_bytes(content)
        yield run


@torch.no_grad()
def run_directory(damage):
    def work():
        model = load_model(run)
        trained_with(run)
        made = load_tokenizer_of(run)
        ids = [each for each in made.encode("the cat").ids if each < model.config.vocab_size] or [0]
        if model.config.longest is None or len(ids) <= model.config.longest:
            assert model(torch.tensor([ids]))[0].shape == (1, len(ids), model.config.vocab_size)

    with with_damage("ended", damage) as run:
        return in_one_line(work)


def resumed_run(damage):
    _, corpus, config = workshop()

    def work():
        assert fit(new_model(config, 0), corpus, RECIPE, run).tokens == RECIPE.steps * RECIPE.batch_size * RECIPE.context

    with with_damage("stopped", damage) as run:
        return in_one_line(work)


headers = damaged({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                   "b": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]}})  # fmt: skip


@st.composite
def safetensors(draw):
    header = json.dumps(draw(headers)).encode()
    length = len(header) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 2**40, 2**63]))
    return (length % 2**64).to_bytes(8, "little") + header + draw(st.sampled_from([bytes(24), bytes(24), b"", bytes(23), bytes(100)]))


def tensors(raw):
    def work():
        for tensor in load_tensors(path).values():
            tensor.sum()

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.safetensors"
        path.write_bytes(raw)
        return in_one_line(work)


@st.composite
def damaged_tokenizer(draw):
    whole = json.loads(tokenizer().to_str())
    return json.dumps(draw(damaged(whole))).encode() if draw(st.integers(0, 3)) else draw(damaged_bytes(json.dumps(whole).encode()))


# Results --------------------------------------------------------------------------------------------------------------------------------------------

MACHINE = {"device": "cpu", "processor": "x", "cores": 2, "memory_gb": 8, "python": "3.11", "torch": "2.9", "commit": None, "dirty": None}
CORPUS = {"name": "novels", "sha256": "ab" * 32, "tokens": 1000, "bytes": 4000, "tokenizer": "bpe"}


def trained_row(model, seed, **more):
    nats = 5.0 + seed / 10 + len(model) / 100
    curve = [{"step": step, "tokens": step * 100, "seconds": 1.0 * step, "train_nats": nats + 1, "val_nats": nats + 1 / step} for step in (1, 2)]
    return {
        "model": model, "seed": seed, "backend": "torch", "model_config": CONFIGS[0], "train_config": RECIPE.to_dict(), "parameters": 1234, "train_tokens": 400,
        "val_nats_per_token": nats, "val_ppl": math.exp(nats), "val_bits_per_byte": 1.5, "tokens_per_second": 100.0, "epoch_seconds": 10.0, "state_bytes": 64,
        "curve": curve, "val_blocks": "blocks/a.npy",
    } | more  # fmt: skip


def file_of(rows, corpus=CORPUS):
    return {"command": "gam bench", "environment": MACHINE, "corpus": corpus, "rows": rows}


FLOOR = {"model": "unigram", "floor": True, "val_nats_per_token": 6.5, "val_ppl": 665.0, "val_bits_per_byte": 2.5, "val_word_ppl": 900.0}
GAPS = [{"gap_from": 2, "answers": 8, "accuracy": 0.5}, {"gap_from": 4, "answers": 8, "accuracy": 0.25}]
RESULTS = [
    file_of([FLOOR, *(trained_row(model, seed) for model in ("gam", "llama") for seed in (0, 1))]) | {"primary": [["gam", "llama"]], "margin": 0.02},
    file_of([trained_row("full", 0, changes={}), trained_row("sum", 0, changes={"fusion": "sum"})]),
    file_of([
        {"model": model, "seed": 0, "backend": "torch", "model_config": CONFIGS[0], "train_config": RECIPE.to_dict(), "task": "mqar", "pairs": pairs, "vocab": 512,
         "sequence_length": 64, "gap_power": 0.01, "filler": "random", "accuracy": 0.5, "answers": 16, "by_gap": GAPS, "state_bytes": 64, "parameters": 1000}
        for model in ("gam", "mamba") for pairs in (4, 8)
    ], None),
    file_of([
        {"model": model, "backend": "torch", "model_config": CONFIGS[0], "sequence_length": length, "batch_size": 1, "dtype": "fp32", "variant": "eager",
         "forward_ms": 1.5, "forward_backward_ms": 3.0, "peak_memory_mb": 20.0, "outcome": "ok"}
        for model in ("gam", "transformer") for length in (256, 512)
    ], None),
    file_of([
        {"model": "gam", "seed": 0, "split": "valid", "context": 256, "model_config": CONFIGS[0], "backend": "torch", "valid_nats_per_token": 4.0, "valid_ppl": 54.0,
         "valid_bits_per_byte": 1.5, "valid_word_ppl": 300.0, "stream_nats_per_token": 3.9, "position_nats": [5.0, 4.0],
         "context_use": {"context": 256, "targets": 64, "by_distance": {"4": {"nats": 4.7, "gain": 0.2, "half_width": 0.03}, "64": None}}, "contexts": {"512": 4.4}},
    ]),
]  # fmt: skip


@st.composite
def damaged_results(draw):
    content = draw(st.sampled_from(RESULTS))
    if draw(st.integers(0, 9)) == 0:
        return draw(damaged_bytes(json.dumps(content).encode())), None
    blocks = draw(damaged_bytes(block_file())) if draw(st.booleans()) else None
    return json.dumps(draw(damaged(content))).encode(), blocks


@cache
def block_file():
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        name = write_blocks(Path(place), "a", np.array([50.0, 60.0, 40.0]), np.array([10.0, 10.0, 9.0]), np.array([0, 0, 1]))
        return (Path(place) / name).read_bytes()


def results(damage):
    raw, blocks = damage
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "results.json"
        path.write_bytes(raw)
        (Path(place) / "blocks").mkdir()
        (Path(place) / "blocks" / "a.npy").write_bytes(block_file() if blocks is None else blocks)

        def reopened():
            Results.open(path, command="gam bench", environment=MACHINE, corpus=read_results(path)["corpus"]).find({"model": "gam", "seed": 0})

        works = [lambda: report_markdown([path]), lambda: compare([place]).paragraph(), reopened]
        return all([in_one_line(work) for work in works])


# Flags ----------------------------------------------------------------------------------------------------------------------------------------------

FLAGS = ("--out", "--steps", "--seeds", "--models", "--context", "--batch-size", "--learning-rate", "--gam.write", "--temperature", "--preset", "--mixers", "--config",
         "--vocab-size", "--lengths", "--margin", "--seconds", "--port", "--top-p", "--seed", "--betas", "--tokens", "--primary", "--data", "--help", "--nonsense")  # fmt: skip
WORDS = st.sampled_from(["0", "1", "-1", "64", "nan", "inf", "-inf", "1e400", "2" * 30, "gam", "mamba", "laptop", "", " ", "x", "None", "True", "a:b", "--", "é", "\udc80", "\0"])


WHOLE = [
    ["env"], ["models"], ["train", "book.txt"], ["train", "book.txt", "--minutes", "2"], ["generate", "run"], ["eval", "run", "--data", "book.txt"],
    ["bench", "--out", "out", "--data", "book.txt"], ["tune", "--out", "out"], ["scale", "--out", "out"], ["recall", "--out", "out"],
]  # fmt: skip
"""Commands that are parsed as they are."""


@cache
def flags_of_verb(verb):
    return sorted("--" + flag.name.replace("_", "-") for flag in flags_of(verb_class(verb), positional_required=VERBS[verb].positional) if not flag.positional)


@st.composite
def commands(draw):
    if draw(st.integers(0, 2)) == 0:  # flags that the verb has, some misspelled
        verb = draw(st.sampled_from(sorted(VERBS)))
        words = verb.split(" ")
        for _ in range(draw(st.integers(1, 3))):
            flag = draw(st.sampled_from(flags_of_verb(verb) or ["--help"]))
            cut = draw(st.integers(2, len(flag)))
            words += [draw(st.sampled_from([flag, flag, flag[:cut], flag[:cut] + flag[cut + 1 :], flag.replace("-", "_"), flag + "="])), *draw(st.lists(WORDS, max_size=2))]
        return words
    if draw(st.booleans()):
        return [*draw(st.sampled_from(WHOLE)), *draw(st.lists(st.sampled_from(FLAGS) | WORDS, max_size=2))]
    verb = draw(st.sampled_from(sorted(VERBS)) | st.text(max_size=6))
    return [*verb.split(" "), *draw(st.lists(st.sampled_from(FLAGS) | WORDS | st.text(max_size=6), max_size=7))]


def flags(arguments):
    def work():
        try:
            for verb in parse(list(arguments)):
                check_numbers(verb)
        except SystemExit as done:
            assert done.code == 0, done.code  # help, or a completion

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        used = in_one_line(work)
    assert not said.getvalue(), said.getvalue()
    return used


# HTTP -----------------------------------------------------------------------------------------------------------------------------------------------

BODIES = [
    {"model": "cat", "prompt": "the cat", "max_tokens": 2, "temperature": 0, "stop": ["x"], "n": 1, "seed": 3, "logprobs": 1, "echo": False, "stream": False},
    {"model": "cat", "messages": [{"role": "system", "content": "be a cat"}, {"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0, "stop": "x"},
]
PATHS = ("/v1/completions", "/v1/chat/completions")
SAID = st.text(max_size=12) | st.sampled_from(["the cat", "<|endoftext|>", "\0", "🙂", "日本", "\ud83d", " " * 300])
SENSIBLE = {
    "max_tokens": st.integers(0, 5), "temperature": st.floats(0, 3), "top_p": st.floats(0.01, 1), "stop": SAID | st.lists(SAID, max_size=5) | st.none(), "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63), "stream": st.booleans(), "echo": st.booleans(), "user": SAID, "logit_bias": st.just({}), "best_of": st.integers(1, 2),
    "stream_options": st.just({"include_usage": True}), "top_k": st.integers(0, 300), "max_completion_tokens": st.integers(1, 5),
}  # fmt: skip
"""Values that requests have, or might."""
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": SAID}), max_size=4)


@st.composite
def requests(draw):
    number = draw(st.integers(0, 1))
    how = draw(st.sampled_from(["sensible", "sensible", "json", "json", "json", "bytes", "any"]))
    if how == "sensible":
        asked = {"prompt": draw(SAID | st.lists(st.integers(0, 259), max_size=6) | st.lists(SAID, max_size=3))} if number == 0 else {"messages": draw(MESSAGES)}
        chosen = draw(st.sets(st.sampled_from(sorted(SENSIBLE)), max_size=4))
        return PATHS[number], json.dumps({"model": "cat"} | asked | {name: draw(SENSIBLE[name]) for name in sorted(chosen)}).encode()
    if how == "json":
        body = json.dumps(draw(damaged(BODIES[number]))).encode()
    else:
        body = draw(damaged_bytes(json.dumps(BODIES[number]).encode())) if how == "bytes" else draw(st.binary(max_size=60))
    return draw(st.sampled_from(PATHS)) if how == "any" else PATHS[number], body


@cache
def client():
    from starlette.testclient import TestClient

    from gam_lm.serve.app import make_app
    from gam_lm.serve.chat import Chat, read_chat_template
    from gam_lm.serve.engine import Engine
    from gam_lm.serve.limits import Limits

    folder = Path(tempfile.mkdtemp(prefix="gam-fuzz-")) / "cat"
    torch.manual_seed(0)
    made = tokenizer()
    model = LanguageModel(ModelConfig(vocab_size=made.get_vocab_size(), hidden_size=8, num_hidden_layers=1)).eval()
    save_model(folder, model, made)
    engine = Engine(model=model, tokenizer=made, piece=64, cache_bytes=2**20, batch=4, draft=0)
    app = make_app(engine, Chat(made, *read_chat_template(folder)), name="cat", limits=Limits(most_tokens=64), api_key=None, hosts=("testserver",), cors=())
    opened = TestClient(app, raise_server_exceptions=False)
    opened.__enter__()
    return opened


def http(request):
    path, body = request
    answer = client().post(path, content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        if "json" in answer.headers["content-type"]:
            assert answer.json()["choices"]
        else:
            assert answer.text.endswith("data: [DONE]\n\n") and "the server made a mistake" not in answer.text, answer.text[-300:]
        return True
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    assert isinstance(answer.json()["error"]["message"], str)
    return False


KINDS = {
    "configurations": Kind(damaged(st.sampled_from(CONFIGS)), configuration),
    "recipes": Kind(damaged(RECIPE.to_dict()), recipe),
    "run directories": Kind(st.deferred(lambda: damaged_run("ended")), run_directory),
    "resumed runs": Kind(st.deferred(lambda: damaged_run("stopped")), resumed_run),
    "safetensors files": Kind(safetensors(), tensors),
    "results and block files": Kind(damaged_results(), results),
    "data files": Kind(data_files, lambda made: outcome(*made)),
    "tokenizer files": Kind(st.deferred(lambda: damaged_tokenizer()), tokenizer_file),
    "folders of texts": Kind(folders(), folder),
    "flags": Kind(commands(), flags),
    "HTTP bodies": Kind(requests(), http),
}
