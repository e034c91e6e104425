"""What the README shows is what the code does and what the results say."""

import json
import re
from pathlib import Path

import pytest

from gam_lm.errors import InputError
from gam_lm.report.published import TABLE_1
from gam_lm.report.readme import render, update
from gam_lm.report.statistics import summarise
from gam_lm.report.verdict import compare
from gam_lm.results import read_results
from gam_lm.training.plan import Plan
from gam_lm.training.plan_words import Figures, explain
from gam_lm.training.recipe import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [line.split("  # ")[1] for line in code.splitlines() if line.startswith("print")]


@pytest.mark.parametrize(
    ("page", "run", "documents"), [("README.md", "shakespeare-2min-decay", 2), ("docs/text.md", "novel-200kb-2min-decay", 1)], ids=["README.md", "text.md"]
)
def test_the_plan_that_a_page_shows_is_that_of_its_run(page, run, documents):
    results = read_results(ROOT / "results" / "dial" / run / "results.json")
    (row,) = (each for each in results["rows"] if "train_config" in each)
    recipe, config, corpus = TrainConfig.from_dict(row["train_config"]), row["model_config"], results["corpus"]
    plan = Plan(
        texts=(corpus["name"],), minutes=row["minutes"], vocab_size=corpus["vocab_size"], tokenizer="bpe", model=row["model"],
        valid_tokens=row["valid_tokens"], seconds=row["expected_seconds"],
    )  # fmt: skip
    said = Figures(
        documents=documents, train_bytes=corpus["bytes"], train_tokens=corpus["tokens"], counted_tokens=corpus["tokens"], valid_tokens=row["valid_tokens"],
        entries=corpus["vocab_size"], left_out=(), parameters=row["parameters"], steps=row["steps"], device="cpu",
        layers=f"{config['num_hidden_layers']} layers of gam, {config['hidden_size']} wide, dropout {config['dropout']:g}",
    )  # fmt: skip
    (block,) = re.findall(r"^```\n(text  .*?\n)```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shown, lines = block.splitlines(), list(explain(plan, recipe, said))
    assert shown == lines[: len(shown)] and len(shown) >= 4


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md", "docs/parts.md"])
def test_the_tables_are_those_of_the_committed_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert render(text, (ROOT / page).parent) == text, f"run: gam report --readme {page}"


def test_every_file_that_the_readme_and_docs_name_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) < 150


def test_a_readme_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        update(tmp_path / "README.md")


def test_the_tables_of_a_gpu_appear_when_they_are_there(tmp_path):
    text = "before\n<!-- gpu gpu -->\nold\n<!-- end -->\n<!-- gpu gpu brief -->\n<!-- end -->\nafter"
    without = render(text, tmp_path)
    assert without.count("No figure of a GPU is given here") == 2 and "old" not in without and render(without, tmp_path) == without
    machine = {"device": "NVIDIA H100", "processor": "a processor", "cores": 2, "torch": "2"}
    same = {"model": "gam", "dtype": "bf16", "variant": "eager", "backend": "torch", "outcome": "ok"}
    parts = {
        "parity": same | {"logits_error": 1e-3, "plain_logits_error": 2e-3, "within": True},
        "blocks": same | {"sequence_length": 256, "batch_size": 4, "forward_backward_ms": 2.0, "output_error": 2e-3},
    }
    for part, row in parts.items():
        (tmp_path / "gpu" / part).mkdir(parents=True)
        content = {"command": "gam bench-gpu", "environment": machine, "corpus": None, "rows": [row]}
        (tmp_path / "gpu" / part / "results.json").write_text(json.dumps(content))
    whole, brief = render(without, tmp_path).split("<!-- gpu gpu brief -->")
    assert "No figure of a GPU" not in whole + brief and "## Parity" in whole and "## Parity" not in brief
    assert all("NVIDIA H100" in each and "| gam | **1.95** (2e-03) |" in each for each in (whole, brief))


def test_a_mark_takes_the_table_of_its_verb_and_the_rows_that_it_names(tmp_path):
    machine = {"device": "cpu", "processor": "a processor", "cores": 2, "torch": "2"}
    row = {"model": "gam-static", "context": 9, "dtype": "fp32", "variant": "eager", "outcome": "ok", "parameters": 10, "step_ms": 2.0,
           "bandwidth": 4e10, "share_of_bandwidth": 0.8, "state_bytes": 2048}  # fmt: skip
    content = {"command": "gam bench-decode --out x", "environment": machine, "corpus": None, "rows": [row | {"batch_size": B} for B in (1, 16)]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    text = "before\n<!-- table results.json{} -->\nold\n<!-- end -->\nafter"
    whole, chosen = (render(text.format(words), tmp_path) for words in ("", " batch_size=16 dtype=fp32"))
    assert whole.count("### batch") == 2 and chosen.count("### batch") == 1 and "### batch 16" in chosen
    assert chosen.startswith("before\n<!-- table results.json batch_size=16 dtype=fp32 -->\n") and chosen.endswith("<!-- end -->\nafter")
    assert render(chosen, tmp_path) == chosen
    with pytest.raises(InputError, match="no rows with batch_size=3"):
        render(text.format(" batch_size=3"), tmp_path)


def rows_of(paths):
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def accuracies(found):
    """Every accuracy below a row, by gap and by length too."""
    if isinstance(found, dict):
        return [found["accuracy"], *accuracies(found.get("by_length", []))] if "accuracy" in found else []
    return [each for entry in found for each in accuracies(entry)]


def figures(rows):
    """How a page may write what these rows of one model measured: losses and perplexities over the seeds, and accuracies in percent."""
    written = {f"{100 * value:.1f}" for row in rows for value in accuracies(row)}
    for name, unit, form in (("tokens_per_second", 1, "{:,.1f}"), ("peak_memory_mb", 1, "{:,.1f}"), ("step_ms", 1, "{:.2f}"),
                             ("state_bytes", 1024, "{:,.1f}"), ("state_bytes", 1024, "{:,.0f}"), ("parameters", 1, "{:,.0f}")):  # fmt: skip
        written |= {form.format(row[name] / unit) for row in rows if row.get(name) is not None}
    alike = {}
    for row in rows:  # a floor is alone: each file has one
        alike.setdefault((row["train_config"]["learning_rate"], row["train_tokens"]) if "train_tokens" in row else id(row), []).append(row)
    for some in alike.values():
        for name, form in (("val_nats_per_token", "{:.3f}"), ("test_nats_per_token", "{:.3f}"), ("val_ppl", "{:,.2f}"), ("test_ppl", "{:,.2f}"),
                           ("paper_val_ppl", "{:,.2f}"), ("val_bits_per_byte", "{:.3f}")):  # fmt: skip
            values = [row[name] for row in some if name in row]
            if values:
                summary = summarise(values)
                written |= {form.format(summary.mean), form.format(summary.half_width)}
    return written


def marked_tables(kind):
    """Of every page, each table behind a mark: the page, the words of the mark, the lines of the table without its head."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for words, table in re.findall(rf"^<!-- {kind} (.+?) -->\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            yield pytest.param(page, words.split(), table.splitlines()[2:], id=f"{page.name}-{words.split()[0].split('/')[-2]}")


@pytest.mark.parametrize(("page", "paths", "lines"), list(marked_tables("figures")))
def test_every_figure_of_a_short_table_is_one_that_its_model_has_in_the_results(page, paths, lines):
    rows = rows_of([page.parent / path for path in paths])
    for line in lines:
        name, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        model = re.split(r"[ ,]", name)[0]
        # The published figures may stand beside ours.
        known = figures([row for row in rows if row["model"] == model]) | {f"{each.val_ppl:,.2f}" for each in TABLE_1 if each.model == model}
        stated = [figure for cell in cells for figure in re.findall(r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+", cell.replace("N(0, 0.02)", "")) if not cell.endswith("×")]
        assert stated and set(stated) <= known, line


@pytest.mark.parametrize(("page", "places", "lines"), list(marked_tables("differences")))
def test_every_difference_of_a_table_is_the_one_that_gam_compare_gives(page, places, lines):
    found = {(each["a"], each["b"]): each for each in compare([str(page.parent / place) for place in places]).to_json()["comparisons"]}
    for line in lines:
        pair, difference, interval = (cell.strip(" *") for cell in line.strip("|").split("|"))
        a, b = pair.split(" − ")
        sign, each = (1, found[a, b]) if (a, b) in found else (-1, found[b, a])
        low, high = sorted(sign * each[end] for end in ("low", "high"))
        assert difference == f"{sign * each['difference']:+.3f}".replace("-", "−"), line
        assert interval == f"{low:+.3f} to {high:+.3f}".replace("-", "−") + ("" if each["shown"] else ": no difference shown"), line


def test_pages_are_short_and_their_own_tables_fit():
    for page in (ROOT / "docs").glob("memory*.md"):
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 150, page.name
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if page.name == "log.md":
            continue
        text = re.sub(r"<!-- table .*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in re.findall(r"^\|[-:|]+\|$", text, re.MULTILINE):
            assert line.count("|") <= 8, f"{page.name} has a table of more than seven columns"
        assert not re.search(r":(?:class|func|meth|mod|attr):", text), page.name
