"""BLiMP, LAMBADA, ARC-easy and PIQA from local files: models and counts, against sums and counts that are made here."""

import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from stacks import BASE, on, stack
from test_cli import refused
from test_harness import loglikelihood

from gam_lm.checkpoint import load_model, load_tokenizer_of, save_model
from gam_lm.cli.main import run
from gam_lm.data.task_files import FORMS, read_examples
from gam_lm.data.tokenizer import train_bpe
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError
from gam_lm.experiments.floors import Bigram, Counts, Unigram
from gam_lm.experiments.models import contender
from gam_lm.hf.baselines import Baseline
from gam_lm.model import LanguageModel
from gam_lm.report.downstream import downstream as tables
from gam_lm.report.sections import kind_of

pytest.importorskip("lm_eval", reason="pip install 'gam-lm[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the harness's own making

WORDS = ["the", "a", "cat", "dog", "hat", "mat", "log", "sat", "ran", "on", "under", "saw", "and", "not"]
TASKS = Path(__file__).parent.parent / "src" / "gam_lm" / "hf" / "tasks"
PARADIGMS = sorted(path.stem for path in (TASKS / "blimp").glob("[!_]*.yaml"))
PAIRS, PASSAGES = 2, 40


def sentence(generator, least=2, most=9):
    return " ".join(generator.choice(WORDS, generator.integers(least, most)))


def examples():
    """File below eval/ → its lines."""
    generator = np.random.default_rng(1)

    def different(number, **lengths):
        found = []
        while len(found) < number:
            new = sentence(generator, **lengths)
            if new not in found:
                found.append(new)
        return found

    def pairs():
        return [dict(zip(("sentence_good", "sentence_bad"), different(2), strict=True), UID="x") for _ in range(PAIRS)]

    def questions(choices, end):
        return [{"query": f"Question: {sentence(generator)}{end}", "choices": different(choices), "gold": int(generator.integers(choices))} for _ in range(6)]

    passages = [{"context": sentence(generator, 3, 40), "continuation": str(generator.choice(WORDS))} for _ in range(PASSAGES)]
    files = {f"blimp/{name}.jsonl": pairs() for name in PARADIGMS}
    return files | {"lambada_openai.jsonl": passages, "arc_easy.jsonl": questions(4, ""), "piqa.jsonl": questions(2, "\n")}


def made_run(path, tokenizer, seed=0):
    torch.manual_seed(seed)
    model = LanguageModel(stack("gam", vocab_size=tokenizer.get_vocab_size())).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(path, model, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run directory, a text, and the files of all tasks."""
    root = tmp_path_factory.mktemp("downstream")
    for name, rows in examples().items():
        path = root / "data" / "eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = np.random.default_rng(2)
    text = "\n".join(sentence(generator) for _ in range(200))
    (root / "text.txt").write_text(text)
    made_run(root / "run", train_bpe([text], 300))
    return root


@pytest.fixture
def data(folder, tmp_path, monkeypatch):
    """GAM_DATA with all files, a cache of the test's own; returns the folder."""
    monkeypatch.setenv("GAM_DATA", str(folder / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def lines(folder, name):
    return [json.loads(line) for line in (folder / "data" / "eval" / name).read_text().splitlines()]


def likeliest(score, before, texts):
    return max(range(len(texts)), key=lambda i: score(before, f" {texts[i]}"))


def expected(folder, score, likeliest_id, tokenizer):
    """What the four tasks give, from ``score``: the log-likelihood of a text after another, and ``likeliest_id``: the best id after some."""

    def accuracy(rows, context):
        return np.mean([likeliest(score, context(row), row["choices"]) == row["gold"] for row in rows])

    blimp = {
        name: np.mean([likeliest(score, "", [row["sentence_good"], row["sentence_bad"]]) == 0 for row in lines(folder, f"blimp/{name}.jsonl")])
        for name in PARADIGMS
    }
    nats, right = [], []
    for row in lines(folder, "lambada_openai.jsonl"):
        nats.append(-score(row["context"], f" {row['continuation']}"))
        before, whole = (tokenizer.encode(text).ids for text in (row["context"], f"{row['context']} {row['continuation']}"))
        right.append(all(likeliest_id(whole[:i]) == whole[i] for i in range(len(before), len(whole))))
    return {
        "blimp": {"acc": np.mean(list(blimp.values())), "paradigms": blimp},
        "lambada": {"acc": np.mean(right), "nats": np.mean(nats), "perplexity": math.exp(np.mean(nats)), "nats_stderr": np.std(nats, ddof=1) / len(nats) ** 0.5},
        "arc_easy": {"acc": accuracy(lines(folder, "arc_easy.jsonl"), lambda row: f"{row['query']}\nAnswer:")},
        "piqa": {"acc": accuracy(lines(folder, "piqa.jsonl"), lambda row: f"{row['query']}Answer:")},
    }  # fmt: skip


def agrees(row, wanted):
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-9), (row["model"], row["task"], name)


@pytest.mark.slow
def test_models_and_counts_get_what_sums_of_log_probabilities_give(data, tmp_path, capsys):
    command = ["eval", str(data / "run"), "--tasks", *FORMS, "--data", str(data / "text.txt"), "--device", "cpu", "--context", "64", "--json"]
    assert run([*command, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["model"], row["task"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 3 * len(FORMS) and json.loads(printed[-1]) == content["rows"]

    model, tokenizer = load_model(data / "run").double(), load_tokenizer_of(data / "run")
    end = tokenizer.token_to_id("<|endoftext|>")

    def ids(before, after):
        context = tokenizer.encode(before).ids or [end]
        return (context, tokenizer.encode(before + after).ids[len(context) :]) if before else (context, tokenizer.encode(after).ids)

    def by_model(before, after):
        context, continuation = ids(before, after)
        return loglikelihood(model, context + continuation, len(context))

    def best_of_model(context):
        with torch.no_grad():
            return int(model(torch.tensor([context]))[0][0, -1].argmax())

    for task, wanted in expected(data, by_model, best_of_model, tokenizer).items():
        agrees(rows["run", task], wanted)

    train, V = prepare(str(data / "text.txt"), tokenizer=str(data / "run" / "tokenizer.json")).splits["train"].ids.tolist(), tokenizer.get_vocab_size()
    count, after = Counter(train), defaultdict(Counter)
    for x, y in zip(train, train[1:], strict=False):
        after[x][y] += 1

    def unigram(x, y):
        return (count[y] + 1) / (len(train) + V)

    def bigram(x, y):
        kinds, seen = len(after[x]), sum(after[x].values())
        return (after[x][y] + kinds * unigram(x, y)) / (seen + kinds) if seen else unigram(x, y)

    for name, chance in (("unigram", unigram), ("bigram", bigram)):

        def by_hand(before, text, chance=chance):
            context, continuation = ids(before, text)
            both = context + continuation
            return sum(math.log(chance(x, y)) for x, y in zip(both[len(context) - 1 :], continuation, strict=False))

        def best(context, chance=chance):
            return max(range(V), key=lambda y: chance(context[-1], y))

        for task, wanted in expected(data, by_hand, best, tokenizer).items():
            agrees(rows[name, task], wanted)

    row = rows["run", "blimp"]
    assert set(row["phenomena"]) == set(rows["bigram", "blimp"]["phenomena"]) and len(row["phenomena"]) == 12 and len(row["paradigms"]) == 67
    assert rows["run", "lambada"]["perplexity_stderr"] == pytest.approx(rows["run", "lambada"]["perplexity"] * rows["run", "lambada"]["nats_stderr"])
    table, phenomena = tables(content)
    assert [line[0] for line in table.floors] == ["unigram counts, text", "bigram counts, text", "chance"]
    assert table.rows[0][:2] == ["run", f"{100 * row['acc']:.1f} ± {100 * row['acc_stderr']:.1f}"] and len(phenomena.rows) == 12
    assert "| run |" in (tmp_path / "out" / "table.md").read_text()


def test_batches_by_length_change_nothing_and_a_long_context_loses_its_beginning(data):
    from lm_eval.models.huggingface import HFLM

    from gam_lm.hf.harness import scored_model

    ours = scored_model(data / "run", context=16, batch_size=2)
    generator = np.random.default_rng(3)
    requests = [
        (None, generator.integers(1, 200, before).tolist(), generator.integers(1, 200, after).tolist())
        for before, after in zip(generator.integers(1, 40, 50), generator.integers(1, 17, 50), strict=True)
    ]
    best = ours.model(torch.tensor([requests[0][1][-16:]])).logits[0, -1].argmax()
    requests.append((None, requests[0][1], [int(best)]))
    stock = HFLM._loglikelihood_tokens(ours, requests, disable_tqdm=True)
    found = ours._loglikelihood_tokens(requests)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in stock], rel=1e-5)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in stock] and found[-1][1]


def test_an_answer_longer_than_the_context_is_scored_in_parts_of_half_a_context(data):
    from gam_lm.hf.harness import scored_model

    ids = np.random.default_rng(5).integers(1, 200, 45).tolist()
    model = load_model(data / "run")
    parts = [(0, 13, 5), (0, 21, 13), (5, 29, 21), (13, 37, 29), (21, 45, 37)]  # from, to, first that is scored: after 5 of a context, 8 at a time
    by_hand = sum(loglikelihood(model, ids[max(start, end - 17) : end], first - max(start, end - 17)) for start, end, first in parts)
    ((found, _),) = scored_model(data / "run", context=16, batch_size=2)._loglikelihood_tokens([(None, ids[:5], ids[5:])])
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_counts_give_probabilities_that_sum_to_one_and_know_their_likeliest():
    V = 7
    train = np.random.default_rng(4).integers(0, V - 1, 60)  # one id is never seen
    counts = Counts.of(train, V)
    for kind in (Unigram(counts), Bigram(counts)):
        for x in range(V):
            chances = kind.log_probabilities(np.full(V, x), np.arange(V))
            assert np.exp(chances).sum() == pytest.approx(1)
            assert chances[kind.likeliest(x)] == chances.max()


@pytest.mark.slow
def test_finished_rows_are_kept_until_the_weights_change(data, tmp_path, capsys, monkeypatch):
    made_run(tmp_path / "run", load_tokenizer_of(data / "run"))
    command = ["eval", str(tmp_path / "run"), "--device", "cpu", "--out", str(tmp_path / "out"), "--data", str(data / "text.txt"), "--examples", "4"]
    assert run([*command, "--tasks", "piqa"]) == 0

    def rows():
        return json.loads((tmp_path / "out" / "results.json").read_text())["rows"]

    before, asked = rows(), []
    from gam_lm.hf import harness

    plain = harness.run_tasks
    monkeypatch.setattr(harness, "run_tasks", lambda scored, tasks, **rest: asked.append((type(scored).__name__, *tasks)) or plain(scored, tasks, **rest))
    assert run([*command, "--tasks", "piqa", "lambada"]) == 0
    assert asked == [("ScoredCounts", "lambada")] * 2 + [("ScoredModel", "lambada")]
    assert len(before) == 3 and all(row in rows() for row in before) and len(rows()) == 6

    asked.clear()
    made_run(tmp_path / "run", load_tokenizer_of(data / "run"), seed=1)
    assert run([*command, "--tasks", "piqa", "lambada"]) == 0
    assert asked == [("ScoredModel", "piqa"), ("ScoredModel", "lambada")] and len(rows()) == 6
    capsys.readouterr()


def test_what_cannot_be_measured_is_one_line(data, tmp_path, capsys, monkeypatch):
    command = ["eval", str(data / "run"), "--device", "cpu", "--tasks"]
    assert "did you mean 'lambada'" in refused(capsys, [*command, "lambda"])
    assert "use one" in refused(capsys, [*command, "piqa", "--harness", "piqa"])
    assert "have the same name, model and recipe" in refused(capsys, ["eval", str(data / "run"), *command[1:], "piqa"])
    assert "does not exist" in refused(capsys, ["eval", str(data / "none"), *command[2:], "piqa"])
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    said = refused(capsys, [*command, "blimp"])
    assert str(tmp_path / "eval" / "blimp") in said and "github.com/alexwarstadt/blimp" in said and "set GAM_DATA" in said
    monkeypatch.delenv("GAM_DATA")
    assert "$GAM_DATA/eval/lambada_openai.jsonl does not exist" in refused(capsys, [*command, "lambada"])
    for name in ["lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(capsys, [*command, "lambada"]).endswith("needs lm_eval: pip install 'gam-lm[eval]'")


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("lambada", '{"context": "a"}'), ("lambada", '{"context": "a", "continuation": ""}'), ("lambada", "[1]"), ("lambada", "{"), ("blimp", '{"sentence_good": "a"}'),
        ("piqa", '{"query": "a", "choices": ["b", "c"], "gold": 2}'), ("piqa", '{"query": "a", "choices": ["b", "c"], "gold": true}'),
        ("arc_easy", '{"query": "a", "choices": ["b"], "gold": 0}'),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(task, line, tmp_path, monkeypatch):
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "x.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=f"x.jsonl, line 2 is no object with {', '.join(FORMS[task])}"):
        read_examples(task, "x.jsonl")
    (tmp_path / "eval" / "x.jsonl").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_examples(task, "x.jsonl")


def test_several_runs_are_measured_on_a_text_too(data, tmp_path, capsys):
    made_run(tmp_path / "other", load_tokenizer_of(data / "run"), seed=1)
    command = ["--data", str(data / "text.txt"), "--context", "16", "--device", "cpu", "--json"]
    alone = []
    for path in (data / "run", tmp_path / "other"):
        assert run(["eval", str(path), *command]) == 0
        alone.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert run(["eval", str(data / "run"), str(tmp_path / "other"), *command, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == alone
    assert [row["model"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == ["run", "other"]


@pytest.mark.slow
def test_a_baseline_has_rows_like_any_other(data, tmp_path, capsys):
    tokenizer = load_tokenizer_of(data / "run")
    config = contender("hf:llama", on(BASE, vocab_size=tokenizer.get_vocab_size()), match=True)[1]
    save_model(tmp_path / "llama", Baseline(config).eval(), tokenizer)
    assert run(["eval", str(data / "run"), str(tmp_path / "llama"), "--tasks", "piqa", "--context", "64", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in content["rows"]] == ["run", "llama"] and all(row["parameters"] > 0 for row in content["rows"])
    (table,) = tables(content)
    assert table.columns == ["Model", "PIQA"] and [line[0] for line in table.rows] == ["run", "llama"]
    assert kind_of(content) == "downstream"
