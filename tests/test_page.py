"""`gam report`: one page from results of every kind, with their numbers and nothing from elsewhere."""

import csv
import html as html_module
import io
import json
import math
import re
import shutil
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from test_compare import TOKENS
from test_results import CORPUS, FLOOR, MACHINE, row
from test_scaling import cell
from test_training_speed import cell as step_of

from gam_lm.cli.main import run
from gam_lm.errors import InputError
from gam_lm.report.lead import found_lead, lead_of
from gam_lm.report.page import find_results, report_html, report_markdown, sections
from gam_lm.report.plots import decades, new_figure
from gam_lm.report.published import TABLE_1, TABLE_2, TABLE_3
from gam_lm.report.tables import context_lengths, context_use
from gam_lm.report.verdict import compare
from gam_lm.results import write_blocks

pytest.importorskip("matplotlib")

HOSTILE = 'no<b>vels</b> & "more" <script>document.title = "taken"</script>'
RESULTS = Path(__file__).parent.parent / "results"


class Page(HTMLParser):
    """The tables, links, headings and ids of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.ids, self.tags, self.svgs = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self.tables.append({"caption": "", "rows": [], "scopes": []})
        elif tag == "caption":
            self.inside = "caption"
        elif tag == "tr":
            self.tables[-1]["rows"].append([])
        elif tag in ("th", "td"):
            self.tables[-1]["rows"][-1].append("")
            self.tables[-1]["scopes"] += [attributes["scope"]] if tag == "th" else []
            self.inside = "cell"
        elif tag == "a":
            self.links.append(attributes)
        elif tag == "svg":
            self.svgs += 1

    inside = None

    def handle_endtag(self, tag):
        if tag in ("th", "td", "caption"):
            self.inside = None

    def handle_data(self, data):
        if self.inside == "caption":
            self.tables[-1]["caption"] += data
        elif self.inside == "cell":
            self.tables[-1]["rows"][-1][-1] += data


def write(folder, rows, corpus=CORPUS, command="gam …"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"command": command, "environment": MACHINE, "corpus": corpus, "rows": rows}))


def trainings(folder):
    """Three models on three seeds: ``b`` is as good as ``a``, ``c`` is worse."""
    rows = [FLOOR]
    rng = np.random.default_rng(0)
    for seed in range(3):
        hardness = rng.normal(size=len(TOKENS))
        for name, gap in (("a", 0.0), ("b", 0.0), ("c<i>", 0.5)):
            nats = (5 + hardness * 0.1 + gap + rng.normal(size=len(TOKENS)) * 0.01) * TOKENS
            blocks = write_blocks(folder, f"{name[0]}-seed{seed}", nats, TOKENS)
            rows.append(row(model=name, seed=seed, nats=float(nats.sum() / TOKENS.sum()), val_blocks=blocks))
    return rows


def evaluated(model="run-a"):
    gain = {"nats": 5.1, "gain": 0.1234, "half_width": 0.0321}
    use = {"context": 64, "targets": 2048, "by_distance": {"4": gain, "16": gain | {"gain": 0.01}, "512": None}}
    return {
        "model": model, "seed": 0, "split": "valid", "context": 64, "valid_nats_per_token": 5.0, "valid_ppl": math.exp(5), "valid_bits_per_byte": 1.5,
        "valid_word_ppl": 900.0, "position_nats": [6 - i / 64 for i in range(64)], "context_use": use, "contexts": {"64": 5.0, "256": 5.25, "4096": None},
    }  # fmt: skip


def answered(model, seed, accuracy):
    return {"model": model, "seed": seed, "task": "mqar", "pairs": 8, "sequence_length": 64, "accuracy": accuracy, "state_bytes": 4096}


def step(model, context, ms, outcome="ok"):
    row = {"model": model, "context": context, "batch_size": 1, "dtype": "bf16", "variant": "eager", "outcome": outcome}
    return row | ({"step_ms": ms, "parameters": 1000, "bandwidth": 4e10, "share_of_bandwidth": 0.5, "state_bytes": 2048} if outcome == "ok" else {})


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder with results of every kind."""
    root = tmp_path_factory.mktemp("results")
    write(root / "first", trainings(root / "first"), CORPUS | {"name": HOSTILE}, command='gam bench --data "<script>" --out first')
    write(root / "first" / "runs" / "a", [])  # what lies below belongs to it
    write(root / "scaling", [cell("gam-static", T) for T in (1024, 2048, 4096)] + [cell("transformer", 1024, "out of memory")], None)
    right = {"gam-mean": (0.5, 0.6), "gam-slots": (0.8, 0.9), "mamba": (0.81, 0.87), "transformer": (0.7,)}
    write(root / "deep" / "recall", [answered(name, seed, share) for name, shares in right.items() for seed, share in enumerate(shares)], None)
    write(root / "use", [evaluated()])
    write(root / "decode", [step("gam-mean", 1000, 1.25), step("gam-mean", 10_000, 1.5), step("transformer", 10_000, 9.0, outcome="over time")], None)
    plain, ours = step_of("gam-mean", "plain", "fp32"), step_of("gam-mean", "compiled", "bf16", tokens_per_second=300.0)
    write(root / "speed", [plain, ours, step_of("gam-mean", "plain", "bf16", "out of memory")], None)
    write(root / "unknown", [{"model": "gam-mean", "milliseconds": 1.25, "note": "<u>"}], None)
    write(root / "empty", [])
    shutil.copytree(RESULTS / "ablation", root / "ablation", ignore=shutil.ignore_patterns("runs"))
    return root


@pytest.fixture(scope="module")
def html(everything):
    return report_html(find_results([everything]))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def table(page, caption):
    return next(each for each in page.tables if each["caption"].startswith(caption))


def test_every_kind_is_found_and_what_lies_below_a_result_is_not(everything, page):
    found = [path.parent.relative_to(everything).as_posix() for path in find_results([everything, everything / "use" / "results.json"])]
    assert found == ["ablation", "decode", "deep/recall", "empty", "first", "scaling", "speed", "unknown", "use"]
    assert [each for each in page.ids if not re.match(r"(p\d|lead)", each)] == [
        "main", "quality", "scaling", "decode", "speed", "ablation", "recall", "context", "other", "environment", "commands",
    ]  # fmt: skip
    assert page.svgs == 1 + 1 + 1 + 1 + 2  # the first screen, the curves below it, speed, ablation, recall: a single line is no picture


def test_every_table_is_captioned_and_scoped_and_downloads_as_it_is_shown(page):
    links = [link for link in page.links if "download" in link]
    shown = {link["href"]: link["download"] for link in links}
    assert len(links) == len(page.tables) + 9 and len({link["download"] for link in links}) == len(links)
    contents = [list(csv.reader(io.StringIO(urllib.parse.unquote(href.split(",", 1)[1])))) for href in shown]
    for each in page.tables:
        assert each["caption"] and each["rows"] in contents
        assert each["scopes"] == ["col"] * len(each["rows"][0]) + ["row"] * (len(each["rows"]) - 1)


def test_nothing_is_loaded_and_no_text_is_taken_for_markup(html, page):
    outside = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src", "xlink:href")]
    assert all(value.startswith(("#", "data:")) for value in outside)
    assert "<script" not in html and "<b>vels" not in html and "<u>" not in html and "<i>" not in html
    assert "no&lt;b&gt;vels" in html and "--data &#34;&lt;script&gt;" in html
    assert len(page.ids) == len(set(page.ids))


def test_quality_says_how_far_each_model_is_from_the_best_and_what_is_noise(everything, page):
    rows = {line[0]: dict(zip(table(page, "Quality")["rows"][0], line, strict=True)) for line in table(page, "Quality")["rows"][1:]}
    over = "Loss over the lowest (nats)"
    assert {rows["a"][over].split(": ")[-1], rows["b"][over].split(": ")[-1]} == {"lowest", "no difference shown"}
    assert rows["c<i>"][over].startswith("+0.5") and "±" in rows["c<i>"][over] and "no difference" not in rows["c<i>"][over]
    content = json.loads((everything / "first" / "results.json").read_text())
    losses = [each["val_nats_per_token"] for each in content["rows"] if each["model"] == "a"]
    assert rows["a"]["Val loss (nats)"].startswith(f"{np.mean(losses):.4f} ± ")
    pairs = {line[0]: line[-1] for line in table(page, "Paired differences")["rows"][1:]}
    assert pairs == {"a − b": "no difference shown", "a − c<i>": "a is lower", "b − c<i>": "b is lower"}


def test_the_published_tables_stand_beside_ours_and_say_so(page):
    for number, figures in (("Table 1. As published", TABLE_1), ("Table 2. As published", TABLE_2), ("Table 3. As published", TABLE_3)):
        assert len(table(page, number)["rows"]) == 1 + len(figures)
    assert ["gam-paper", "wikitext-2", "22.6 M", "117.2", "6.7828", "882.57"] in table(page, "Table 1. As")["rows"]
    assert ["4,096", "105.03", "2,370.35", "out of memory", ""] in table(page, "Table 2. As")["rows"]
    assert ["full", "22,599,680", "900.84"] in table(page, "Table 3. As")["rows"]


def test_tables_have_the_numbers_of_the_results(page):
    assert ["run-a", "valid", "64", "5.0000", "148.41", "1.5000", "900.0", ""] in table(page, "Evaluation")["rows"]
    assert table(page, "Context use")["rows"][1:] == [
        ["4", "+0.1234 ± 0.0321"], ["16", "+0.0100 ± 0.0321: no difference shown"], ["512", "not measurable"],
    ]  # fmt: skip
    assert table(page, "Loss by context length")["rows"][1:] == [["64", "5.0000"], ["256", "5.2500"], ["4,096", "not measurable"]]
    assert table(page, "Recall")["rows"][1][4].startswith("55.0 % ± ")
    assert table(page, "Recall: percentage")["rows"][1] == [
        "mqar", "8", "64", "", "-30.0 ± 0.0", "best", "-1.0 ± 50.9: no difference shown", "-10.0 (one seed)",  # two of three pairs are left: t of one degree of freedom at 97.5 %
    ]  # fmt: skip
    assert ["1,024", "1.02", "10.2", "out of memory", ""] in table(page, "Forward and backward")["rows"]
    assert table(page, "Figures")["rows"][1:] == [["gam-mean", "1.25", "<u>"]]
    assert ["gam-mean", "1,000", "compiled bf16", "300", "3.00", "", "5", "50 %", "200", ""] in table(page, "batch 8, context 256")["rows"]
    assert table(page, "batch 1, bf16")["rows"][1] == ["gam-mean", "1,000", "1.25", "1.50", "1.20", "50 %", "2", "2"]
    assert {line[0].rsplit("/", 1)[-1] for line in table(page, "Where")["rows"][1:]} == {"ablation", "decode", "recall", "empty", "first", "scaling", "speed", "unknown", "use"}


def test_markdown_has_the_same_tables(everything, page):
    text = html_module.unescape(report_markdown(find_results([everything])))
    lines = {tuple(cell.strip().strip("*").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in text.splitlines() if line.startswith("|")}
    for each in page.tables:
        assert all(tuple(line) in lines for line in each["rows"])


def test_an_inlined_picture_is_whole(html):
    for number, svg in enumerate(re.findall(r"<svg.*?</svg>", html, re.DOTALL)):
        root = ElementTree.fromstring(svg)
        ids = {each.get("id") for each in root.iter() if each.get("id")}
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) == ids, number
        assert root.get("role") == "img" and root.get("aria-label") and root.get("viewBox") and not root.get("width")
        assert "#000000" not in svg and "metadata" not in svg


def test_a_picture_has_two_lines_or_is_left_out(tmp_path):
    def drawn(folder, rows, corpus=CORPUS):
        write(tmp_path / folder, rows, corpus)
        return [picture.caption for section in sections([tmp_path / folder / "results.json"], tmp_path) for part in section.parts for picture in part.pictures]

    assert drawn("one", [evaluated()]) == [] and len(drawn("two", [evaluated(), evaluated("run-b")])) == 3
    lengths = (1024, 2048)
    assert drawn("short", [cell("gam", T) for T in lengths], None) == []
    assert len(drawn("long", [cell(name, T) for name in ("gam", "mamba") for T in lengths], None)) == 2


@pytest.mark.parametrize(("low", "high"), [(1.02, 1.3), (5.2, 9.8), (105, 131), (0.011, 0.013), (1, 1e6), (3, 40)])
def test_a_logarithmic_axis_has_numbers_that_differ(low, high):
    figure, axes = new_figure()
    axes.plot([1, 2], [low, high])
    decades(axes)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    said = [label.get_text() for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if bottom <= place <= top]
    assert len(said) >= 2 and all(said) and len(set(said)) == len(said)


def test_the_first_screen_answers_with_the_interval_that_compare_gives(everything):
    lead = found_lead(find_results([everything]))
    assert "lowest validation loss" in lead.question and len(lead.table.rows) + len(lead.table.floors) <= 7
    pairs = {frozenset((each["a"], each["b"])): each for each in compare([str(everything / "first")]).to_json()["comparisons"]}
    (lowest, *_), *others = lead.table.rows
    assert [float(line[1].split()[0]) for line in lead.table.rows] == sorted(float(line[1].split()[0]) for line in lead.table.rows)
    for line in others:
        each = pairs[frozenset((lowest, line[0]))]
        over, half_width = abs(each["difference"]), (each["high"] - each["low"]) / 2
        assert line[2].startswith(f"+{over:.3f} ± {half_width:.3f}") and ("no difference" in line[2]) != each["shown"]
    first = pairs[frozenset((lowest, others[0][0]))]
    assert f"({100 * first['level']:.4g} % interval" in lead.answer and "no difference" in lead.answer and "1 of the 2 other models" in lead.answer
    alone = lead_of([f"{everything / 'first'}:c<i>", f"{everything / 'first'}:{lowest}"])
    assert re.search(rf"{lowest}: 0\.\d+ nats per token below c<i>, the next lowest \(95 % interval 0\.\d+ to 0\.\d+, 3 seeds\)", alone.answer)


def test_results_that_named_their_comparisons_come_first(everything, tmp_path):
    content = json.loads((everything / "first" / "results.json").read_text())
    two = [each for each in content["rows"] if each["model"] != "b" and each.get("seed", 0) < 2]
    write(tmp_path / "named", [{key: value for key, value in each.items() if key != "val_blocks"} for each in two])
    named = json.loads((tmp_path / "named" / "results.json").read_text()) | {"primary": [["a", "c<i>"]]}
    (tmp_path / "named" / "results.json").write_text(json.dumps(named))
    found = found_lead([everything / "first" / "results.json", tmp_path / "named" / "results.json"])
    assert [line[0] for line in found.table.rows] == ["a", "c<i>"] and "(95 % interval" in found.answer
    assert found_lead([everything / "use" / "results.json", everything / "ablation" / "results.json"]) is None


def test_a_first_screen_of_one_model_is_refused(everything, tmp_path, capsys):
    out = tmp_path / "index.html"
    assert run(["report", str(everything / "first"), "--lead", f"{everything / 'first'}:a", "--out", str(out)]) == 2
    assert "name at least two models" in capsys.readouterr().err and not out.exists()


def test_the_verb_writes_either_form(everything, tmp_path, capsys):
    out = tmp_path / "new" / "index.html"
    assert run(["report", str(everything / "first"), str(everything / "use"), "--out", str(out)]) == 0
    assert "2 results.json" in capsys.readouterr().out and out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(["report", str(everything / "use"), "--markdown", "--out", str(tmp_path / "r.md")]) == 0
    assert "| run-a | valid |" in (tmp_path / "r.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("place", "said"), [("none", "no such folder"), ("", "no results.json in it")])
def test_a_place_without_results_is_named(place, said, tmp_path):
    with pytest.raises(InputError, match=said):
        find_results([tmp_path / place])


def test_the_committed_results_are_all_in_the_committed_page():
    paths = sorted(RESULTS.rglob("results.json"))
    page = (RESULTS / "report" / "index.html").read_text(encoding="utf-8")
    kinds = {section.anchor for section in sections(paths, None)}
    assert kinds == set(re.findall(r'<h2 id="(\w+)"', page)) - {"environment", "commands"}
    for path in paths:
        assert path.parent.relative_to(RESULTS.parent).as_posix() in page, "run: gam report --out results/report/index.html"


def test_a_context_that_was_not_asked_for_is_left_empty():
    def row(model, by_distance, contexts):
        return {"model": model, "context_use": {"targets": 9, "by_distance": by_distance}, "contexts": contexts}

    gain = {"gain": 0.5, "half_width": 0.1}
    results = {"rows": [row("a", {"4": gain, "16": gain}, {"64": 5.0, "256": 4.5}), row("b", {"4": None}, {"64": None})]}
    assert context_use(results).rows == [["4", "+0.5000 ± 0.1000", "not measurable"], ["16", "+0.5000 ± 0.1000", ""]]
    assert context_lengths(results).rows == [["64", "5.0000", "not measurable"], ["256", "4.5000", ""]]
