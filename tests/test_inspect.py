"""`gam inspect trace` and `gam inspect slots`: files that say what the API says, of static and written memories, of a text of any length."""

import csv
import json
import re
import tracemalloc

import pytest
import torch
from stacks import WINDOWED, stack
from test_page import Page, table

from gam_lm.checkpoint import load_model, load_tokenizer_of, save_model
from gam_lm.cli.main import run
from gam_lm.data.tokenizer import train_bpe
from gam_lm.diagnostics.slots import slot_uses
from gam_lm.diagnostics.trace import trace
from gam_lm.mixers.registry import mixer_names
from gam_lm.model import LanguageModel
from gam_lm.report.trace_page import figures, write_json, write_page

HOSTILE = "alpha <b>beta</b> & </script><script>document.title = 'taken'</script> {{ gamma }}\n\n  end"
TEXT = HOSTILE + " alpha beta gamma, alpha beta" * 6
MEMORIES = {"static": "gam-static", "delta": "gam-slots", "keys": "gam", "mean": "gam-mean", "both": "gam-slots+static_path=true", "hybrid": WINDOWED}


def save_run(folder, name):
    """A run directory of a small model that nobody trained."""
    torch.manual_seed(1)
    tokenizer = train_bpe([TEXT], 280)
    config = stack(name, vocab_size=tokenizer.get_vocab_size())
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return {name: save_run(tmp_path_factory.mktemp("runs") / name, model) for name, model in MEMORIES.items()}


every_memory = pytest.mark.parametrize("memory", MEMORIES)


def traced(directory, text=TEXT, **settings):
    """The model's traces of a text."""
    model, tokenizer = load_model(directory), load_tokenizer_of(directory)
    ids = tokenizer.encode(text).ids
    return [token.to_dict() for token in trace(model, ids, tokenizer, **settings)]


def plain(value):
    return json.loads(json.dumps(value))


@every_memory
def test_the_trace_as_json_is_what_the_api_says(runs, memory, tmp_path, capsys):
    out = tmp_path / "trace.json"
    assert run(["inspect", "trace", str(runs[memory]), "--text", TEXT, "--window", "32", "--out", str(out), "--device", "cpu"]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert (
        content["tokens"] == plain(traced(runs[memory], window=32))
        and content["model_config"] == stack(MEMORIES[memory], vocab_size=content["model_config"]["vocab_size"]).to_dict()
    )
    assert "".join(token["text"] for token in content["tokens"]) == TEXT
    assert "Layer" in capsys.readouterr().out


@every_memory
def test_the_page_of_a_trace_holds_the_same_figures_and_takes_no_text_for_markup(runs, memory, tmp_path, capsys):
    tokens = traced(runs[memory])
    out = tmp_path / "trace.html"
    write_page(iter(tokens), {"run": "a<b>", "model": "gam"}, out, sheet=16)
    html = out.read_text(encoding="utf-8")
    names = json.loads(re.search(r'id="names">(.*?)</script>', html)[1])
    sheets = [json.loads(each) for each in re.findall(r'class="sheet">(.*?)</script>', html)]
    assert [len(sheet) for sheet in sheets[:-1]] == [16] * (len(tokens) // 16) and sum(map(len, sheets)) == len(tokens)
    for token, shown in zip(tokens, (each for sheet in sheets for each in sheet), strict=True):
        assert shown["text"] == token["text"]
        assert shown["surprise_nats"] == (None if token["index"] == 0 else pytest.approx(token["surprise_nats"], rel=1e-3))
        for layer, own, wanted in zip(token["layers"], shown["layers"], names, strict=True):
            assert dict(zip(wanted, own["figures"], strict=True)) == pytest.approx(figures(layer), rel=1e-3, abs=1e-12)
            assert {name: [slot for slot, _ in slots] for name, slots in own["slots"].items()} == {
                name: [slot for slot, _ in read["slots"]] for name, read in layer["reads"].items()
            }
            assert [place for place, _ in own.get("sources", [])] == [place for place, _ in layer["sources"]]
    assert html.count("<script") == 2 + len(sheets) and "a<b>" not in html and "src=" not in html
    means = table(Page(html), "Means")
    gate = means["rows"][0].index("gate of local")
    assert float(means["rows"][1][gate]) == pytest.approx(sum(token["layers"][0]["gates"]["local"] for token in tokens) / len(tokens), abs=1e-4)


@pytest.mark.parametrize("mixer", [name for name in mixer_names() if name != "gam"])
def test_a_model_without_slots_is_traced_and_has_none_to_look_at(mixer, tmp_path, capsys):
    folder = save_run(tmp_path / mixer, mixer)
    assert run(["inspect", "trace", str(folder), "--text", TEXT, "--out", str(tmp_path / "trace.html"), "--device", "cpu"]) == 0
    assert "| added by mixer |" in capsys.readouterr().out
    assert run(["inspect", "slots", str(folder), "--text", TEXT, "--device", "cpu"]) == 2
    assert "no memory slots" in capsys.readouterr().err


def test_without_out_the_means_are_printed(runs, capsys):
    assert run(["inspect", "trace", str(runs["delta"]), "--text", TEXT, "--tokens", "12", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| write gate |" in printed and "12 tokens." in printed


def repeated(token, count):
    return (token | {"index": index} for index in range(count))


@pytest.mark.parametrize("write", [write_json, lambda *arguments: write_page(*arguments, sheet=16)])
def test_writing_a_long_text_takes_no_more_memory_than_a_short_one(runs, write, tmp_path):
    token = traced(runs["delta"])[-1]
    write(repeated(token, 50), {"run": "", "model": ""}, tmp_path / "warm.html")
    peaks = []
    for count in (100, 1000):
        tracemalloc.start()
        write(repeated(token, count), {"run": "", "model": ""}, tmp_path / f"{count}.html")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "1000.html").stat().st_size > 5 * (tmp_path / "100.html").stat().st_size
    assert peaks[1] < 1.3 * peaks[0]


@every_memory
def test_the_slots_as_json_and_csv_are_what_the_api_says(runs, memory, tmp_path, capsys):
    model, tokenizer = load_model(runs[memory]), load_tokenizer_of(runs[memory])
    uses = plain([use.to_dict() for use in slot_uses(model, tokenizer.encode(TEXT).ids, tokenizer, remove=2)])
    command = ["inspect", "slots", str(runs[memory]), "--text", TEXT, "--remove", "2", "--device", "cpu", "--out"]
    assert run([*command, str(tmp_path / "slots.json")]) == 0
    assert json.loads((tmp_path / "slots.json").read_text(encoding="utf-8"))["slots"] == uses
    assert run([*command, str(tmp_path / "slots.csv")]) == 0
    with (tmp_path / "slots.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for use, row in zip(uses, rows, strict=True):
        assert (
            float(row["mean_share"]) == use["mean_share"]
            and row["dead"] == str(use["dead"])
            and json.loads(row["near_address"]) == use["near_address"]
        )
        assert row["removal_nats"] == ("" if use["removal_nats"] is None else str(use["removal_nats"]))
    assert "| 0 | " in capsys.readouterr().out

    assert run([*command, str(tmp_path / "slots.html")]) == 0
    page = Page((tmp_path / "slots.html").read_text(encoding="utf-8"))
    shown = [line for each in page.tables if each["caption"].startswith("Layer") for line in each["rows"][1:]]
    assert len(shown) == len(uses) and sum("±" in " ".join(line) for line in shown) == 2 * len({(use["layer"], use["memory"]) for use in uses})
    assert len({use["layer"] for use in uses}) == (3 if memory == "hybrid" else 2)
    most = max((use for use in uses if (use["layer"], use["memory"]) == (0, uses[0]["memory"])), key=lambda use: use["mean_share"])
    assert shown[0][:2] == [str(most["slot"]), f"{100 * most['mean_share']:.2f} %"]


def test_a_corpus_is_read_as_far_as_was_asked(runs, tmp_path, capsys):
    (tmp_path / "novel.txt").write_text("".join(f"alpha beta gamma {i}\n" for i in range(400)))
    out = tmp_path / "trace.json"
    command = ["inspect", "trace", str(runs["mean"]), "--data", str(tmp_path / "novel.txt"), "--split", "train", "--tokens", "20", "--out", str(out)]
    assert run([*command, "--device", "cpu"]) == 0
    assert len(json.loads(out.read_text(encoding="utf-8"))["tokens"]) == 20


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "use either --text"), (["--text", "a b", "--data", "stdlib"], "use either --text"), (["--text", "alpha", "--tokens", "1"], "at least 2"),
        (["--text", "alpha beta", "--out", "page.pdf"], "endings .html"), (["--text", ""], "give at least"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["trace", "slots"])
def test_a_text_that_cannot_be_read_is_named(runs, verb, flags, said, capsys):
    assert run(["inspect", verb, str(runs["static"]), *flags, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
