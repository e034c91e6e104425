"""`report.html` of a run: what `gam train` writes beside the model, and that it says what metrics.jsonl says."""

# ruff: noqa: F811 (fixtures are imported by name)

import json
import math
import re
import signal

import numpy as np
import pytest
import torch
from browsing import brightness, chromium, fits, show, texts  # noqa: F401
from one_command import SMALL, make_folder
from stacks import BASE, on, stack
from test_page import Page

import gam_lm.training.loop as loop
from gam_lm.cli.main import run
from gam_lm.cli.run_page import MOST_LOOKS, by_octave
from gam_lm.diagnostics.memory_use import BANK, DISTANCES, FARTHER, memory_use
from gam_lm.diagnostics.trace import trace
from gam_lm.model import LanguageModel
from gam_lm.report.chart import HEIGHT, WIDTH, Line, chart, ticks
from gam_lm.report.run_page import RunFacts, read_metrics, run_page

TRAIN = ["train", "my_text.txt", "--steps", "6", "--validate-every", "2", *SMALL]
FACTS = RunFacts(name="mine", model="gam", steps=40, plan=("text        much",), command="gam train --config run.toml")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return make_folder(tmp_path, monkeypatch)


def line(step, **more):
    return {"step": step, "tokens": 100 * step, "seconds": 1.5 * step, "train_nats": 5 - step / 100, "val_nats": 5.1 - step / 100} | more


def test_a_run_leaves_a_page_with_every_validation_and_tells_it(folder, capsys):
    assert run(TRAIN) == 0
    said, out = capsys.readouterr().out, folder / "runs/my_text"
    assert f"page: {out.relative_to(folder)}/report.html" in said
    page, lines = (out / "report.html").read_text(encoding="utf-8"), read_metrics(out / "metrics.jsonl")
    assert [each["step"] for each in lines if each.get("sample")] == [2, 4, 6]
    rows = next(each for each in Page(page).tables if each["caption"] == "Every validation")["rows"][1:]
    assert [(row[0], row[4]) for row in rows] == [(str(each["step"]), f"{each['val_nats']:.4f}") for each in lines if "val_nats" in each]
    assert "Trained for 6 steps" in page and "unigram counts" in page and "Load this page again" not in page
    bits = float(re.search(r"<strong>([\d.]+) bits per byte", page)[1])
    assert f"bits per byte: {bits:.3f}" in said
    outside = [value for _, attributes in Page(page).tags for key, value in attributes.items() if key in ("href", "src")]
    assert all(value.startswith(("#", "data:")) for value in outside) and "<script" not in page


def test_a_run_that_was_stopped_ends_with_the_page_of_one_that_was_not(folder, monkeypatch):
    def without_times(directory):
        lines = [{key: value for key, value in each.items() if key != "seconds"} for each in read_metrics(directory / "metrics.jsonl")]
        return lines, re.sub(r"whole|stopped|<td>\d+</td>|time</dt><dd>[^<]*|href=\"data[^\"]*\"", "", (directory / "report.html").read_text(encoding="utf-8"))

    assert run([*TRAIN, "--out", "whole"]) == 0
    original, count = loop.train_step, 0

    def step(*arguments):
        nonlocal count
        count += 1
        if count == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    assert run([*TRAIN, "--out", "stopped"]) == 130
    page = (folder / "stopped/report.html").read_text(encoding="utf-8")
    assert "Step 4 of 6" in page and "Trained for" not in page
    assert run([*TRAIN, "--out", "stopped"]) == 0
    assert without_times(folder / "stopped") == without_times(folder / "whole")


def test_looking_changes_nothing_of_the_training(folder, monkeypatch):
    assert run([*TRAIN, "--dropout", "0.2", "--out", "seen"]) == 0
    monkeypatch.setattr("gam_lm.cli.run_page.RunPage.look", lambda self, step, validation: {})
    assert run([*TRAIN, "--dropout", "0.2", "--out", "unseen"]) == 0
    assert (folder / "seen/model.safetensors").read_bytes() == (folder / "unseen/model.safetensors").read_bytes()


def test_a_run_of_many_validations_is_looked_at_in_a_few(folder):
    assert run(["train", "my_text.txt", "--steps", "31", "--validate-every", "1", "--out", "many", *SMALL]) == 0
    looked = [each["step"] for each in read_metrics(folder / "many/metrics.jsonl") if "sample" in each]
    assert looked == [*range(3, 31, 3), 31] and len(looked) <= MOST_LOOKS + 1


@pytest.mark.parametrize("name", ["gam", "gam-mean", "gam-static", "transformer", "mamba"])
def test_the_memory_is_used_as_the_trace_says(name):
    model = LanguageModel(stack(name, on(BASE, vocab_size=31, hidden_size=8, options={"gam": {"num_memory_slots": 6}}))).double()
    ids = torch.randint(31, (80,)).tolist()
    found = memory_use(model, ids, tokens=60)
    traced = list(trace(model, ids[:60], window=60, top=60))[30:]
    assert model.training and len(found) == len(model.layers)
    for number, layer in enumerate(found):
        parts = [each.layers[number] for each in traced]
        if parts[0].bank is None:
            assert layer == {}
            continue
        assert layer[BANK] == pytest.approx(np.mean([each.bank for each in parts])) and layer["write gate"] == pytest.approx(np.mean([each.write_gate for each in parts]))
        assert sum(layer[each] for each in (*DISTANCES, FARTHER, BANK)) == pytest.approx(1)
        own = [sum(share for place, share in part.sources if place == token.index) for part, token in zip(parts, traced, strict=True)]
        assert layer["this token"] == pytest.approx(np.mean(own))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (4.31, 7.22), (-3, 1e6), (0.001, 0.0013), (10, 57)])
def test_ticks_are_few_round_and_evenly_apart(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
    apart = np.diff(found)
    assert np.allclose(apart, apart[0]) and round(apart[0] / 10 ** math.floor(math.log10(apart[0]) + 1e-9), 6) in (1, 2, 5)


def test_a_chart_has_its_points_in_proportion_and_inside(capsys):
    svg = chart([Line(name="a<b>", points=[(0, 1), (5, 3), (10, 2)], colour="red", marked=True)], "x", "y", "all", across={"near": 2.5, "far": 99})
    points = np.array([[float(x), float(y)] for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)])
    assert (points > 0).all() and (points < [WIDTH, HEIGHT]).all()
    assert points[1, 0] - points[0, 0] == pytest.approx(points[2, 0] - points[1, 0], abs=0.2)
    assert points[2, 1] - points[1, 1] == pytest.approx((points[0, 1] - points[1, 1]) / 2, abs=0.2) and points[1, 1] < points[2, 1]
    assert ">near<" in svg and ">far<" not in svg and "a&lt;b&gt;" in svg
    doubled = chart([Line(name="a", points=[(1, 1), (2, 1), (4, 1)], colour="red", marked=True)], "x", "y", "all", doubling=True)
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', doubled)]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2) and all(f">{each}<" in doubled for each in (1, 2, 4))


def test_octaves_hold_every_place_but_the_first_once():
    nats = np.random.default_rng(0).random(256)
    found = by_octave(nats)
    widths = [2**k for k in range(8)]
    assert len(found) == 8 and sum(widths) == 255 and [x for x, _ in found] == sorted(x for x, _ in found)
    assert sum(mean * width for (_, mean), width in zip(found, widths, strict=True)) == pytest.approx(nats[1:].sum(), abs=0.05)
    assert by_octave(nats[:1]) == [] and by_octave(nats[:6]) == [[1.0, round(nats[1], 4)], [2.45, round(nats[2:4].mean(), 4)], [4.47, round(nats[4:6].mean(), 4)]]


def test_what_a_model_writes_stays_text():
    page = run_page([line(10, sample="<script>alert(1)</script>\n", memory=[{}])], FACTS)
    assert "<script" not in page and "&lt;script&gt;" in page and "No layer of this model has a written memory" in page


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    memory = [{**dict.fromkeys([*DISTANCES, FARTHER, BANK], 0.2), "write gate": 0.5}, {}]
    lines = [line(step, sample=f"once {step} " * 40, memory=memory, by_place=[[1.0, 5.5], [2.45, 5.2], [5.3, 5.0]]) for step in (10, 20, 30, 40)]
    lines = json.loads(json.dumps(lines))
    path = tmp_path_factory.mktemp("run") / "report.html"
    path.write_text(run_page(lines, FACTS), encoding="utf-8")
    return path


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_any_screen_and_folds_earlier_samples(show, run_file, width):
    browser = show(run_file, width=width)
    assert fits(browser) and len(texts(browser, ".samples article")) == 4 and texts(browser, ".samples h3")[0].startswith("Step 40")
    folded = browser.find_element("xpath", "//summary[contains(., '1 earlier sample')]")
    hidden = browser.find_elements("css selector", "details .samples article")
    assert not hidden[0].is_displayed()
    folded.send_keys("\ue007")  # Enter
    assert hidden[0].is_displayed() and fits(browser)
    # The parts of a bar are as long as their shares, and every text of a chart lies on the page.
    parts = browser.execute_script("return [...document.querySelectorAll('.bars div i')].map((each) => each.getBoundingClientRect().width)")
    assert len(parts) == 5 and max(parts) - min(parts) < 1
    right = browser.execute_script("return Math.max(...[...document.querySelectorAll('.chart text')].map((each) => each.getBoundingClientRect().right))")
    assert right <= browser.execute_script("return document.documentElement.clientWidth")


@pytest.mark.browser
def test_the_page_is_light_and_dark(show, run_file):
    paper, ink = brightness(show(run_file))
    assert paper > 700 and ink < 150
    paper, ink = brightness(show(run_file, scheme="dark"))
    assert paper < 150 and ink > 600
