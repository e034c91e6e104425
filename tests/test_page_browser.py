"""The page that runs a model, in a real browser: its logits, its text, its switches, by keyboard and on a phone."""

import os
from pathlib import Path

import pytest
import torch
from browsing import brightness, chromium, fits, show, texts  # noqa: F401
from test_export import run_directory

from gam_lm import generate, load_model
from gam_lm.checkpoint import load_tokenizer_of
from gam_lm.cli.main import run
from gam_lm.inference.int8 import quantize_int8

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'gam-lm[dev]'")

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.browser
PROMPT = "the cat sat on the mat and on the hat"


def exported(folder, *flags):
    out = folder.with_suffix(".html")
    assert run(["export", str(folder), "--format", "page", "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    return {name: exported(run_directory(folder / name, name)) for name in ("gam", "gam-static")}


def opened(show, path, **how):  # noqa: F811
    browser = show(path, **how)
    WebDriverWait(browser, 60).until(lambda browser: browser.find_element("id", "go").is_enabled())
    browser.execute_script("document.getElementById('temperature').value = 0; document.getElementById('most').value = 24")
    return browser


def say(browser, text, key=Keys.ENTER):
    field = browser.find_element("id", "ask")
    field.clear()
    field.send_keys(text, key)
    done(browser)


def done(browser):
    WebDriverWait(browser, 60).until(lambda browser: texts(browser, "#go") == ["Go on"] and "tokens" in texts(browser, "#status")[0])


@pytest.mark.parametrize("name", ["gam", "gam-static"])
def test_logits_and_text_in_the_browser_are_those_of_the_int8_model(show, pages, name, int8_widened):  # noqa: F811
    folder = pages[name].with_suffix("")
    model, tokenizer = load_model(folder), load_tokenizer_of(folder)
    quantize_int8(model)
    ids = tokenizer.encode(PROMPT).ids
    browser = opened(show, pages[name])
    logits = browser.execute_script("const other = new GAM.Model(made.config, model); return arguments[0].map((id) => [...other.step(id)])", ids)
    with torch.no_grad():
        assert (torch.tensor(logits) - model.stream(torch.tensor([ids]))[0][0]).abs().max() < 1e-3
    say(browser, PROMPT)
    new = list(generate(model, ids, max_new_tokens=24, temperature=0))
    assert browser.execute_script("return tokens.map((each) => each.id)") == ids + new
    surprise = browser.execute_script("return tokens.map((each) => each.surprise)")
    with torch.no_grad():
        expected = -model.stream(torch.tensor([ids + new]))[0][0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids + new)[1:, None])[:, 0]
    assert surprise[0] is None and surprise[1:] == pytest.approx(expected.tolist(), abs=1e-3)
    assert browser.execute_script("return document.querySelectorAll('#text .given').length") == len(ids)


def test_a_page_asks_for_nothing_from_outside(pages):
    text = pages["gam"].read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text and " src=" not in text


def test_pointing_at_a_token_shows_what_it_read_and_the_newest_is_followed(show, pages):  # noqa: F811
    browser = opened(show, pages["gam"], width=1280)
    say(browser, PROMPT)
    count = browser.execute_script("return tokens.length")
    assert f"token {count}" in texts(browser, "#chosen")[0] and not browser.find_element("id", "follow").is_displayed()
    browser.find_element("css selector", "#text [aria-selected=true]").send_keys(Keys.HOME)
    for _ in range(5):
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "token 6" in texts(browser, "#chosen")[0] and "nats" in texts(browser, "#surprise")[0]
    found = browser.execute_script("return tokens[5].layers[0]")
    shown = texts(browser, "#sources .bar > :last-child")
    assert shown == [f"{100 * share:.1f} %" for share in [*(each["share"] for each in found["sources"]), found["bank"]]]
    assert sum(each["share"] for each in found["sources"]) + found["bank"] == pytest.approx(1) and len(found["sources"]) == 6
    framed = browser.execute_script("return [...document.querySelectorAll('#text .source')].map((each) => Number(each.dataset.index))")
    assert framed == sorted(each["index"] for each in found["sources"] if each["share"] > 0.01)
    before = texts(browser, "#gates .bar > :last-child")
    browser.find_element("id", "layer").send_keys(Keys.ARROW_RIGHT)
    assert texts(browser, "#layer-name") == ["2 of 2"] and texts(browser, "#gates .bar > :last-child") != before
    browser.find_element("id", "follow").click()
    assert f"token {count}" in texts(browser, "#chosen")[0]
    shot(browser, "page-1280")


def test_a_head_is_switched_off_by_keyboard_and_the_text_goes_on_without_it(show, pages, int8_widened):  # noqa: F811
    folder = pages["gam"].with_suffix("")
    model, tokenizer = load_model(folder), load_tokenizer_of(folder)
    quantize_int8(model)
    ids = tokenizer.encode(PROMPT).ids
    browser = opened(show, pages["gam"])
    browser.find_elements("css selector", "#memory button")[1].send_keys(Keys.SPACE)
    assert browser.find_element("id", "slots").get_attribute("value") == "4-7" and "4 of 8 slots of layer 1" in texts(browser, "#off")[0]
    browser.find_element("id", "slots").send_keys(" 0", Keys.TAB)
    pressed = "return [...document.querySelectorAll('#memory button')].map((each) => each.getAttribute('aria-pressed'))"
    assert browser.execute_script(pressed) == ["true", "false"]
    say(browser, PROMPT)
    silent = torch.tensor([True, False, False, False, True, True, True, True])
    with torch.no_grad():
        model.layers[0].mixer.written.silent_M = silent
        expected = model.stream(torch.tensor([ids]))[0][0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    found = browser.execute_script("return tokens.map((each) => each.surprise)")[1 : len(ids)]
    assert found == pytest.approx((-expected).tolist(), abs=1e-3)
    browser.find_elements("css selector", "#memory button")[1].send_keys(Keys.SPACE)
    assert browser.execute_script(pressed) == ["true", "true"] and browser.find_element("id", "slots").get_attribute("value") == "0"


def test_a_slot_of_the_static_memory_is_switched_off_by_a_click(show, pages):  # noqa: F811
    browser = opened(show, pages["gam-static"])
    say(browser, "the cat")
    assert not browser.find_element("id", "reads").is_displayed()
    browser.find_element("css selector", "#memory canvas").click()  # its middle
    assert browser.find_element("id", "slots").get_attribute("value") == "4" and browser.execute_script("return model.silent[0][4]") == 1
    say(browser, "")
    assert browser.execute_script("return model.layers[0].seen.shares[4]") == 0


def test_a_text_is_stopped_and_started_anew(show, pages):  # noqa: F811
    browser = opened(show, pages["gam"])
    browser.execute_script("document.getElementById('most').value = 1e6; document.getElementById('temperature').value = 1; made.tokenizer.end = -1")
    field = browser.find_element("id", "ask")
    field.clear()
    field.send_keys("the", Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda browser: browser.execute_script("return tokens.length") > 30)
    field.send_keys(Keys.ESCAPE)
    done(browser)
    assert "stopped" in texts(browser, "#status")[0] and browser.execute_script("return tokens.length") < 1e5
    browser.find_element("id", "anew").click()
    WebDriverWait(browser, 60).until(lambda browser: browser.execute_script("return tokens.length") == 0)
    browser.execute_script("document.getElementById('most').value = 3")
    say(browser, "")
    assert browser.execute_script("return tokens.length") == 4  # the end of a text before it, and three


def test_the_page_works_on_a_phone_in_the_dark(show, pages):  # noqa: F811
    browser = opened(show, pages["gam"], scheme="dark", width=390)
    paper, ink = brightness(browser)
    assert paper < 150 and ink > 600
    say(browser, PROMPT)
    assert fits(browser)
    shot(browser, "page-390-dark")
    assert browser.execute_script("return [...document.querySelectorAll('input, textarea')].every((each) => each.labels.length === 1)")
    assert fits(opened(show, pages["gam-static"], width=390))


def test_fp16_and_a_hostile_name_stay_what_they_are(show, tmp_path):  # noqa: F811
    folder, note = run_directory(tmp_path / "a<img src=x onerror=alert(1)>{weights}{note}", "gam"), "Of <img src=y> and {data}."
    browser = opened(show, exported(folder, "--weights", "fp16", "--note", note))
    assert texts(browser, "h1") == [folder.name] and note in texts(browser, "header p") and not browser.find_elements("css selector", "img")
    model, ids = load_model(folder), [5, 9, 2]
    logits = browser.execute_script("return arguments[0].map((id) => [...model.step(id)])", ids)
    with torch.no_grad():
        assert (torch.tensor(logits) - model.stream(torch.tensor([ids]))[0][0]).abs().max() < 2e-2


@pytest.mark.skipif("GAM_PAGE" not in os.environ, reason="GAM_PAGE names no page of a model of 5 M parameters to time")
def test_a_model_of_5_m_parameters_writes_100_tokens_a_second(show):  # noqa: F811
    browser = opened(show, Path(os.environ["GAM_PAGE"]), width=1280)
    browser.execute_script("document.getElementById('most').value = 300; document.getElementById('temperature').value = 1; made.tokenizer.end = -1")
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    say(browser, "Once upon a time")  # the browser compiles what it runs often
    before, count = busy(browser), browser.execute_script("return -tokens.length")
    say(browser, "and then")
    seconds = busy(browser) - before
    shot(browser, "page-5m-1280")
    count += browser.execute_script("return tokens.length")
    print(texts(browser, "#facts"), texts(browser, "#status"), f"{count / seconds:.0f} tokens in a second of the processor, everything drawn")
    assert count / seconds >= 100


def busy(browser):
    """Seconds of the processor that the page's thread has taken, whatever else the machine does."""
    figures = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(each["value"] for each in figures if each["name"] == "TaskDuration")


def shot(browser, name):
    """Keep a picture where GAM_SCREENSHOTS says so."""
    if folder := os.environ.get("GAM_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
