"""The pages in a real browser: nothing on the console, what moves shows something else, and the numbers are those of the results."""

# ruff: noqa: F811 (fixtures are imported by name)

import json

import pytest
from browsing import brightness, chromium, fits, show, texts  # noqa: F401
from test_inspect import HOSTILE, TEXT, runs, save_run, traced  # noqa: F401
from test_page import Page, everything, html  # noqa: F401

from gam_lm.cli.main import run
from gam_lm.report.slots_page import write_page as write_slots
from gam_lm.report.trace_page import figures

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'gam-lm[dev]'")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

pytestmark = pytest.mark.browser


def tables(browser, selector="table"):
    """Captions and cells of the tables."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map((table) => "
        "[table.caption.textContent, [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent))])"
    )
    return dict(browser.execute_script(script, selector))


def unfold(browser):
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")


@pytest.fixture(scope="module")
def report(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


def test_the_report_shows_the_tables_and_pictures_it_is_made_of(show, report, html, everything):
    browser = show(report)
    shown = tables(browser)
    assert [shown[each["caption"]] for each in Page(html).tables] == [each["rows"] for each in Page(html).tables]
    losses = [row["val_nats_per_token"] for row in json.loads((everything / "first" / "results.json").read_text())["rows"] if row["model"] == "c<i>"]
    assert next(line for line in shown["Quality"] if line[0] == "c<i>")[3].startswith(f"{sum(losses) / 3:.4f} ± ")
    unfold(browser)
    sizes = browser.execute_script("return [...document.querySelectorAll('svg')].map((each) => [each.clientWidth, each.clientHeight])")
    assert len(sizes) == Page(html).svgs and all(width > 300 and height > 100 for width, height in sizes)
    assert browser.title == "gam-lm: results"


def test_the_report_is_light_dark_and_fits_a_phone(show, report):
    paper, ink = brightness(show(report))
    assert paper > 700 and ink < 150
    browser = show(report, scheme="dark", width=390)
    paper, ink = brightness(browser)
    assert paper < 150 and ink > 600 and fits(browser)
    unfold(browser)
    assert fits(browser)
    assert browser.execute_script("return getComputedStyle(document.querySelector('svg text')).fill") == browser.execute_script(
        "return getComputedStyle(document.body).color"
    )


def test_the_report_opens_with_one_screen_and_folds_the_rest(show, report):
    browser = show(report, width=1280)
    for selector in ("h1", ".answer", ".lead svg", ".lead table"):
        shown = browser.find_element("css selector", selector)
        assert shown.is_displayed() and shown.rect["y"] + shown.rect["height"] < 900, selector
    assert browser.execute_script("return document.documentElement.scrollHeight") < 2 * 900
    parts = browser.find_elements("css selector", ".question")
    assert parts and not any(each.get_property("open") for each in parts)
    inside = parts[0].find_element("css selector", ".part table")
    assert not inside.is_displayed()
    parts[0].find_element("css selector", "summary").send_keys(Keys.ENTER)
    assert inside.is_displayed()


@pytest.fixture(scope="module")
def trace_page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "trace.html"
    assert run(["inspect", "trace", str(runs["delta"]), "--text", TEXT, "--out", str(path), "--device", "cpu"]) == 0
    return path, traced(runs["delta"])


def shown_figures(browser, layer):
    return {name: float(value) for name, value in tables(browser, "#token table")[f"Layer {layer}"][1:]}


def test_pointing_at_a_token_shows_what_it_did(show, trace_page):
    path, tokens = trace_page
    browser = show(path)
    assert browser.execute_script("return document.getElementById('text').textContent") == TEXT.replace("\n", "↵\n")
    assert browser.title.startswith("Trace of") and "taken" not in browser.title
    browser.find_element("id", "layer").send_keys(Keys.END)
    spans = browser.find_elements("css selector", "#text [role=option]")
    assert len(spans) == len(tokens) < 256 and not browser.find_element("id", "pages").is_displayed()
    for index in (len(tokens) // 2, len(tokens) - 2):
        ActionChains(browser).move_to_element(spans[index]).perform()
        assert f"surprise {tokens[index]['surprise_nats']:.4g}" in texts(browser, "#token-name")[0]
        assert shown_figures(browser, 1) == pytest.approx(figures(tokens[index]["layers"][1]), rel=1e-3, abs=1e-12)
        sources = tables(browser, "#token table")["Read from the memory: who wrote it"][1:]
        assert [int(place) for _, place, _ in sources if place] == [place for place, _ in tokens[index]["layers"][1]["sources"]]
        bank, before = tokens[index]["layers"][1]["bank"], tokens[index]["layers"][1]["before"]
        assert sources[-2:] == [["the learned bank", "", f"{100 * bank:.1f} %"], ["older tokens", "", f"{100 * before:.1f} %"]]
        framed = browser.execute_script("return [...document.querySelectorAll('#text .source')].map((each) => Number(each.dataset.index))")
        assert framed == sorted(place for place, _ in tokens[index]["layers"][1]["sources"])


def test_the_trace_is_for_the_keyboard_alone(show, trace_page):
    path, tokens = trace_page
    browser = show(path)
    slider = browser.find_element("id", "layer")
    slider.send_keys(Keys.END)
    browser.find_element("css selector", "#text [aria-selected=true]").send_keys(Keys.HOME)
    assert shown_figures(browser, 1) == pytest.approx(figures(tokens[0]["layers"][1]), rel=1e-3, abs=1e-12)
    slider.send_keys(Keys.HOME)
    assert shown_figures(browser, 0) == pytest.approx(figures(tokens[0]["layers"][0]), rel=1e-3, abs=1e-12)
    browser.find_element("css selector", "#text [aria-selected=true]").send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("data-index") == "2"
    assert shown_figures(browser, 0) == pytest.approx(figures(tokens[2]["layers"][0]), rel=1e-3, abs=1e-12)
    browser.switch_to.active_element.send_keys(Keys.END)
    assert browser.switch_to.active_element.get_attribute("data-index") == str(len(tokens) - 1)
    assert browser.execute_script("return [...document.querySelectorAll('input, select')].every((each) => each.labels.length === 1)")


RETURNS = "Romeo said no. Then Romeo said yes, and Romeo said no again."


def test_a_first_look_says_which_earlier_token_a_returning_one_read(show, runs, tmp_path):
    path = tmp_path / "returns.html"
    assert run(["inspect", "trace", str(runs["delta"]), "--text", RETURNS, "--out", str(path), "--device", "cpu"]) == 0
    tokens = traced(runs["delta"], RETURNS)
    browser = show(path)
    for again in (False, True):
        chosen = int(browser.find_element("css selector", "#text [aria-selected=true]").get_attribute("data-index"))
        layer = int(browser.find_element("id", "layer").get_attribute("value"))
        sources = {place: share for place, share in tokens[chosen]["layers"][layer]["sources"] if place != chosen}
        arcs = browser.execute_script("return [...document.querySelectorAll('#arcs path')].map((each) => [Number(each.dataset.place), each.classList.contains('told')])")
        assert {place for place, _ in arcs} == sources.keys()
        [told] = [place for place, is_told in arcs if is_told]
        assert tokens[chosen]["id"] in (tokens[told]["id"], tokens[told - 1]["id"])
        story = texts(browser, "#story")[0]
        assert story.startswith(f"{100 * sources[told]:.1f} % of what layer {layer}") and f"(place {told}), {chosen - told} token" in story and "returns" in story
        if not again:
            browser.find_element("css selector", "#text [aria-selected=true]").send_keys(Keys.HOME)
            assert "(place 0) read nothing that an earlier token wrote" in texts(browser, "#story")[0]
            browser.find_element("id", "first").send_keys(Keys.ENTER)


def test_the_heat_map_shows_what_the_memory_holds_and_leads_to_its_tokens(show, trace_page):
    path, tokens = trace_page
    browser = show(path)
    browser.find_element("id", "layer").send_keys(Keys.END)
    script = "const c = document.getElementById('heat'); "
    script += "return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)]"
    width, height, strength = browser.execute_script(script)
    held = [token["layers"][1]["held"] for token in tokens]
    assert (width, height) == (len(tokens), len(held[0]))
    most = max(map(max, held))
    expected = [255 * held[t][row] / most for row in range(height) for t in range(width)]
    assert strength == pytest.approx(expected, abs=1)
    ActionChains(browser).move_to_element(browser.find_element("id", "heat")).perform()
    middle = [f"Place {place}, token {tokens[place]['id']};" for place in (len(tokens) // 2 - 1, len(tokens) // 2)]  # a column may begin there
    assert texts(browser, "#token caption")[0].startswith(tuple(middle))


def test_a_model_without_a_memory_has_no_heat_map_and_no_arc(show, runs, tmp_path):
    path = tmp_path / "static.html"
    assert run(["inspect", "trace", str(runs["static"]), "--text", TEXT, "--out", str(path), "--device", "cpu"]) == 0
    browser = show(path, scheme="dark", width=390)
    assert not browser.find_element("id", "heat-figure").is_displayed() and not browser.find_elements("css selector", "#arcs path")
    assert "names no earlier token" in texts(browser, "#story")[0] and fits(browser)


def test_a_colour_follows_the_figure_that_was_chosen(show, trace_page):
    path, tokens = trace_page
    browser = show(path)
    browser.find_element("id", "layer").send_keys(Keys.END)
    Select(browser.find_element("id", "colour")).select_by_visible_text("write gate")
    strength = browser.execute_script("return [...document.querySelectorAll('#text span')].map((each) => Number(each.style.getPropertyValue('--value')))")
    gates = [token["layers"][1]["write_gate"] for token in tokens]
    assert strength.index(max(strength)) == gates.index(max(gates)) and strength.index(min(strength)) == gates.index(min(gates))


def test_a_long_text_is_turned_sheet_by_sheet(show, runs, tmp_path):
    path = tmp_path / "long.html"
    assert run(["inspect", "trace", str(runs["static"]), "--text", TEXT * 12, "--out", str(path), "--device", "cpu"]) == 0
    browser = show(path, width=390)
    assert fits(browser)
    first = texts(browser, "#text")[0]
    browser.find_element("id", "after").click()
    spans = texts(browser, "#text span")
    assert texts(browser, "#text")[0] != first and len(spans) == 256
    assert browser.execute_script("return Number(document.querySelector('#text span').dataset.index)") == 256
    browser.find_element("css selector", "#text [aria-selected=true]").send_keys(Keys.ARROW_LEFT)  # over the border
    assert browser.switch_to.active_element.get_attribute("data-index") == "255"
    assert texts(browser, "#text")[0] == first


@pytest.fixture(scope="module")
def slots_page(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name in ("slots.html", "slots.json"):
        command = ["inspect", "slots", str(runs["delta"]), "--text", TEXT, "--remove", "2", "--device", "cpu", "--out", str(folder / name)]
        assert run(command) == 0
    return folder / "slots.html", json.loads((folder / "slots.json").read_text(encoding="utf-8"))["slots"]


SHOWN = ".memory:not([hidden]) table"


def test_the_slider_goes_through_the_layers_of_the_slots(show, slots_page):
    path, slots = slots_page
    browser = show(path)
    for layer in (0, 1):
        [(caption, (_, *rows))] = tables(browser, SHOWN).items()
        assert caption == f"Layer {layer}, written memory"
        own = sorted((slot for slot in slots if slot["layer"] == layer), key=lambda slot: -slot["mean_share"])
        assert [line[0] for line in rows] == [str(slot["slot"]) for slot in own]
        assert [line[1] for line in rows] == [f"{100 * slot['mean_share']:.2f} %" for slot in own]
        for line, slot in zip(rows, own, strict=True):
            assert line[6].startswith("" if slot["removal_nats"] is None else f"{slot['removal_nats']:+.4f} ± {slot['removal_half_width']:.4f}")
        browser.find_element("id", "layer").send_keys(Keys.ARROW_RIGHT)
    assert fits(browser) and "taken" not in browser.title


def test_slots_are_sorted_and_searched(show, slots_page):
    path, slots = slots_page
    browser = show(path)
    browser.find_element("css selector", f"{SHOWN} thead th button").click()
    [(_, *rows)] = tables(browser, SHOWN).values()
    assert [int(line[0]) for line in rows] == sorted((slot["slot"] for slot in slots if slot["layer"] == 0), reverse=True)
    wanted = next(text for _, text, _ in slots[0]["fires_on"] if text.strip())
    browser.find_element("id", "find").send_keys(wanted.strip())
    visible = browser.execute_script(f"return [...document.querySelectorAll('{SHOWN} tbody tr')].filter((row) => !row.hidden).map((row) => row.textContent)")
    assert visible and all(wanted.strip().lower() in text.lower() for text in visible)
    browser.find_element("id", "find").send_keys("no such token")
    assert texts(browser, "#shown") == ["0 slots shown"]


def test_on_a_phone_a_slot_is_a_card_that_names_its_figures(show, slots_page):
    path, slots = slots_page
    browser = show(path, width=390, scheme="dark")
    assert fits(browser)
    script = (
        f"return [...document.querySelectorAll('{SHOWN} tbody tr:first-child > *')].filter((each) => each.offsetHeight).map((each) => "
        "[each.dataset.name, each.textContent, each.getBoundingClientRect().right, getComputedStyle(each, '::before').content])"
    )
    cells = browser.execute_script(script)
    names = [name for name, *_ in cells]
    assert names[:2] == ["Slot", "Share of reads"] and "Fires on (share)" in names
    assert all(right <= 390 and said not in ("none", "normal") for _, _, right, said in cells)
    top = max((slot for slot in slots if slot["layer"] == 0), key=lambda slot: slot["mean_share"])
    assert cells[0][1] == str(top["slot"])
    browser.find_element("css selector", f"{SHOWN} thead th button").send_keys(Keys.ENTER)
    assert browser.execute_script(script)[0][1] == str(max(slot["slot"] for slot in slots if slot["layer"] == 0))


def test_of_many_slots_the_most_read_come_first_and_all_on_demand(show, tmp_path):
    slot = {"layer": 0, "memory": "written", "largest_share": 0.5, "top_tokens": 1, "dead": False, "write_share": 0.01, "removal_nats": None, "removal_half_width": None}
    slots = [slot | {"slot": i, "mean_share": 0.001 * i, "fires_on": [], "near_address": [], "near_value": []} for i in range(60)]
    write_slots(slots, {"run": "mine", "model": "gam", "tokens": 9}, tmp_path / "slots.html")
    browser = show(tmp_path / "slots.html")
    visible = "return [...document.querySelectorAll('.memory tbody tr')].filter((row) => !row.hidden).map((row) => row.cells[0].textContent)"
    assert browser.execute_script(visible) == [str(i) for i in range(59, 35, -1)] and texts(browser, "#shown") == ["24 of 60 slots shown"]
    browser.find_element("css selector", ".memory thead th button").click()
    browser.find_element("css selector", ".memory thead th button").click()
    assert browser.execute_script(visible)[:3] == ["0", "1", "2"]
    browser.find_element("id", "all").send_keys(Keys.ENTER)
    assert len(browser.execute_script(visible)) == 60 and not browser.find_element("id", "all").is_displayed()


def test_a_hostile_name_of_a_run_stays_text(show, tmp_path):
    folder = save_run(tmp_path / "a<img src=x onerror=alert(1)>", "gam-slots")
    for verb in ("trace", "slots"):
        path = tmp_path / f"{verb}.html"
        assert run(["inspect", verb, str(folder), "--text", HOSTILE, "--out", str(path), "--device", "cpu"]) == 0
        browser = show(path)
        assert "<img src=x" in texts(browser, "h1")[0] and not browser.find_elements("css selector", "img")
