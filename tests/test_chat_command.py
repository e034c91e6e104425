"""`gam train --chat` and `gam chat`, from an empty folder."""

import io
import json
import random
import re

import pytest
from one_command import SMALL, make_folder, refused

from gam_lm.checkpoint import read_json
from gam_lm.cli.main import run
from gam_lm.report.run_page import read_metrics
from gam_lm.results import read_results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return make_folder(tmp_path, monkeypatch)


def conversations(path, number=24, words=("red", "green")):
    draw = random.Random(1)
    rows = []
    for _ in range(number):
        word = draw.choice(words)
        said = [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
        rows.append(json.dumps({"messages": [*said, {"role": "user", "content": "<|endoftext|> again"}, {"role": "assistant", "content": "again"}]}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_a_model_learns_to_answer_and_is_talked_to(folder, capsys, monkeypatch):
    words = ("quick", "lazy")
    conversations(folder / "talk.jsonl", words=words)
    sizes = ["--hidden-size", "32", "--num-hidden-layers", "2", "--vocab-size", "280", "--precision", "fp32", "--device", "cpu"]
    assert run(["train", "my_text.txt", "--steps", "2", *sizes]) == 0
    teach = ["train", "--chat", "talk.jsonl", "--from", "runs/my_text", "--device", "cpu"]
    assert run([*teach, "--steps", "60", "--context", "64", "--batch-size", "4", "--learning-rate", "0.01", "--muon-learning-rate", "0.02"]) == 0
    said, out = capsys.readouterr().out, folder / "runs/my_text-talk"
    assert "24 conversations" in said and "tokens of answers" in said and "gam chat runs/my_text-talk" in said
    assert (out / "chat_template.jinja").is_file()
    samples = [line["sample"] for line in read_metrics(out / "metrics.jsonl") if "sample" in line]
    assert re.fullmatch(r"User: say (quick|lazy)\nAssistant: \1", samples[-1]) and f"A sample:\n{samples[-1]}\n" in said
    floors = {row["model"]: row["val_bits_per_byte"] for row in read_results(out / "results.json")["rows"]}
    assert floors["gam"] < floors["unigram"] and floors["bigram"] < floors["unigram"]  # answers are few words
    monkeypatch.setattr("sys.stdin", io.StringIO("say quick\n<|endoftext|> again\n/new\nsay lazy\n"))
    assert run(["chat", str(out), "--temperature", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == ["quick", "again", "lazy"]
    assert run(teach) == 0  # finished already

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    message = [{"role": "user", "content": "say quick"}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == "User: say quick\nAssistant:"


def test_a_model_without_conversations_is_talked_to_in_plain_lines(folder, capsys, monkeypatch):
    assert run(["train", "my_text.txt", "--steps", "2", *SMALL]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    assert run(["chat", "runs/my_text", "--system", "Be brief.", "--max-new-tokens", "5", "--seed", "0", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "has learned no conversations" in captured.err and captured.out.count("\n") >= 2
    assert "system holds half of a surrogate pair or a byte that is no UTF-8" in refused(capsys, ["chat", "runs/my_text", "--system", "h\udce9"])
    monkeypatch.setattr("sys.stdin", io.StringIO("h\udce9\n"))  # a byte that is no UTF-8, as Python reads it in the locale C
    assert "standard input holds half of a surrogate pair" in refused(capsys, ["chat", "runs/my_text", "--device", "cpu"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: no JSON"), ('{"text": "x"}', "no list of messages"), ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0] is no message"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"), ('{"messages": [{"role": "user"}]}', "messages[0] is no message"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "line 2: messages[0] holds half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_broken_conversation_is_named(folder, capsys, row, said):
    assert run(["train", "my_text.txt", "--steps", "1", *SMALL]) == 0
    conversations(folder / "talk.jsonl", 1)
    with (folder / "talk.jsonl").open("a", encoding="utf-8") as file:
        file.write(row + "\n")
    message = refused(capsys, ["train", "--chat", "talk.jsonl", "--from", "runs/my_text", "--device", "cpu"])
    assert said in message and "talk.jsonl" in message
    conversations(folder / "talk.jsonl", 1)
    assert "has 1 conversations" in refused(capsys, ["train", "--chat", "talk.jsonl", "--from", "runs/my_text", "--device", "cpu"])


def test_long_prompts_are_taught_to_learned_positions(folder, capsys):
    """Shorter sequences than a plan's, a prompt that the positions cannot hold, and fewer rows with an answer than a batch would take."""
    assert run(["train", "my_text.txt", "--steps", "1", "--positions", "learned", "--max-position-embeddings", "32", *SMALL]) == 0
    said = [{"role": "user", "content": "quick " * 40}, {"role": "assistant", "content": "lazy"}]
    (folder / "talk.jsonl").write_text(2 * (json.dumps({"messages": said}) + "\n"), encoding="utf-8")
    assert run(["train", "--chat", "talk.jsonl", "--from", "runs/my_text", "--steps", "2", "--device", "cpu"]) == 0
    recipe = read_json(folder / "runs/my_text-talk/recipe.json")["train_config"]
    assert (recipe["context"], recipe["batch_size"]) == (32, 1)
    sample = read_metrics(folder / "runs/my_text-talk/metrics.jsonl")[-1]["sample"]
    assert "quick" in sample
