"""lm-evaluation-harness on run directories, with tasks of our own from local files."""

import json
import math

import pytest
import torch
from stacks import BASE, on, stack
from test_cli import refused

from gam_lm.checkpoint import load_model, load_tokenizer_of, save_model
from gam_lm.cli.main import run
from gam_lm.data.tokenizer import train_bpe
from gam_lm.experiments.models import contender
from gam_lm.hf.baselines import Baseline
from gam_lm.inference.generation import generate
from gam_lm.model import LanguageModel

pytest.importorskip("lm_eval", reason="pip install 'gam-lm[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the harness's own making

TEXTS = ["the cat sat on the mat and the dog on the log\nthe hat", "the dog sat on the hat", "a naïve cat — and a mat"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/{name}.jsonl
test_split: test
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["never to be seen"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
"""


@torch.no_grad()
def loglikelihood(model, ids, start=1):
    logits, _ = model(torch.tensor([ids]))
    return float(logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum())


@pytest.fixture
def folder(tmp_path):
    """A run directory and three tasks, whose right answers are the library's own."""
    tokenizer = train_bpe(TEXTS * 4, 300)
    model = LanguageModel(stack("gam", vocab_size=tokenizer.get_vocab_size())).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(tmp_path / "run", model, tokenizer)

    def task(name, description, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path) + description)

    task("rolling", ROLLING, [{"text": text} for text in TEXTS])
    choices, rows = ["cat", "dog and a hat", "mat"], []
    for question in ("the", "the cat sat on the"):
        before = tokenizer.encode(question).ids
        chances = [loglikelihood(model, tokenizer.encode(f"{question} {choice}").ids, len(before)) for choice in choices]
        rows.append({"question": question, "choices": choices, "answer": max(range(3), key=chances.__getitem__)})
    task("choice", CHOICE, rows)
    rows = [{"question": text, "answer": tokenizer.decode(list(generate(model, tokenizer.encode(text).ids, max_new_tokens=6, temperature=0)))}
            for text in ("the cat", "a naïve cat and a mat")]  # fmt: skip
    task("generated", GENERATED, rows)
    return tmp_path


def test_the_harness_finds_what_the_library_finds(folder, capsys):
    command = ["eval", str(folder / "run"), "--harness", "rolling", "choice", "generated", "--harness-tasks", str(folder / "tasks")]
    rest = ["--context", "64", "--device", "cpu", "--json", "--out", str(folder / "out")]
    assert run([*command, *rest]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, tokenizer = load_model(folder / "run"), load_tokenizer_of(folder / "run")
    end = tokenizer.token_to_id("<|endoftext|>")
    total = sum(loglikelihood(model, [end, *tokenizer.encode(text).ids]) for text in TEXTS)
    words, size = sum(len(text.split()) for text in TEXTS), sum(len(text.encode()) for text in TEXTS)
    assert figures["rolling"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert figures["rolling"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert figures["choice"]["acc"] == figures["generated"]["exact_match"] == 1
    rows = {row["task"]: row for row in json.loads((folder / "out" / "results.json").read_text())["rows"]}
    assert rows["choice"]["acc"] == 1 and rows["rolling"]["context"] == 64 and rows["rolling"]["model"] == "run"


def test_a_text_longer_than_the_context_goes_by_windows(folder, capsys):
    command = ["eval", str(folder / "run"), "--harness", "rolling", "--harness-tasks", str(folder / "tasks"), "--device", "cpu", "--json"]
    assert run([*command, "--context", "8", "--examples", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rolling"]["bits_per_byte"]
    model, tokenizer = load_model(folder / "run"), load_tokenizer_of(folder / "run")
    ids = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(TEXTS[0]).ids]
    whole, rest = divmod(len(ids) - 1, 8)
    assert whole and rest  # the last window is as long as the others: it reads again what the one before it predicted
    total = sum(loglikelihood(model, ids[i : i + 9]) for i in range(0, 8 * whole, 8)) + loglikelihood(model, ids[-9:], 9 - rest)
    assert found == pytest.approx(-total / len(TEXTS[0].encode()) / math.log(2), rel=1e-4)


def test_baselines_are_measured_too(folder, capsys):
    tokenizer = load_tokenizer_of(folder / "run")
    config = contender("hf:llama", on(BASE, vocab_size=tokenizer.get_vocab_size()), match=True)[1]
    model = Baseline(config).eval()
    save_model(folder / "llama", model, tokenizer)
    command = ["eval", str(folder / "llama"), "--harness", "rolling", "--harness-tasks", str(folder / "tasks"), "--context", "64"]
    assert run([*command, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rolling"]["word_perplexity"]
    total = sum(loglikelihood(model, [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(text).ids]) for text in TEXTS)
    assert found == pytest.approx(math.exp(-total / sum(len(text.split()) for text in TEXTS)), rel=1e-4)


def test_what_cannot_be_measured_is_one_line(folder, capsys):
    command = ["eval", str(folder / "run"), "--device", "cpu", "--harness"]
    assert "harness_tasks is" in refused(capsys, [*command, "rolling", "--harness-tasks", str(folder / "none")])
    (folder / "rolling.jsonl").unlink()
    assert "the data cannot be loaded" in refused(capsys, [*command, "rolling", "--harness-tasks", str(folder / "tasks")])
    assert "does not exist" in refused(capsys, ["eval", str(folder / "none"), "--harness", "rolling"])
    assert run(["export", str(folder / "run"), "--format", "int8", "--out", str(folder / "int8")]) == 0
    assert "is int8" in refused(capsys, ["eval", str(folder / "int8"), "--harness", "rolling"])


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest_one(folder, capsys):
    command = ["eval", str(folder / "run"), "--device", "cpu", "--harness", "lambada_openay"]
    assert "did you mean 'lambada_openai'" in refused(capsys, command)
