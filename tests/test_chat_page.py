"""The chat page in a real browser: by keyboard, on a phone, in the dark; saving and forking."""

import json
import os
from pathlib import Path

import pytest
from test_serve import small_model, small_tokenizer
from test_serve_hostile import serving
from tokenizers import Tokenizer

from gam_lm import save_model

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'gam-lm[dev]'")

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_browser import brightness, chromium, fits, texts  # noqa: F401

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "cat"
    # Without a token that ends a text, an answer has as many tokens as it may.
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str().replace("<|endoftext|>", "<|never|>"))
    save_model(path, small_model(tokenizer.get_vocab_size()), tokenizer)
    with serving(path, "--api-key", "sesam", "--most-tokens", "60000") as (server, _):
        yield f"http://{server[0]}:{server[1]}/"


@pytest.fixture
def page(chromium, server):  # noqa: F811
    """The page with nothing saved, at a width and in a colour scheme."""

    def opened(*, scheme="light", width=1280, height=800):
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        chromium.get(server)
        chromium.execute_script("localStorage.clear()")
        chromium.get(server)
        WebDriverWait(chromium, 60).until(lambda browser: browser.find_element("id", "figures").text)
        assert "API key" in chromium.find_element("id", "figures").text  # it has not been given yet
        chromium.execute_script("document.getElementById('key').value = 'sesam'; document.getElementById('key').onchange()")
        WebDriverWait(chromium, 60).until(lambda browser: browser.find_element("id", "model").text == "cat")
        chromium.execute_script("document.getElementById('max_tokens').value = 12")
        chromium.get_log("browser")  # the refusal without a key
        return chromium

    yield opened
    assert chromium.get_log("browser") == []


def say(browser, text):
    """Type a message and wait for the answer."""
    before = len(texts(browser, ".message"))
    field = browser.find_element("id", "ask")
    field.send_keys(text, Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda browser: len(texts(browser, ".message")) == before + 2 and texts(browser, ".message:last-child .figures"))


def test_a_chat_by_keyboard_streams_and_shows_its_figures(page):
    browser = page()
    assert browser.switch_to.active_element.get_attribute("id") == "ask" and brightness(browser)[0] > brightness(browser)[1]
    say(browser, "the cat")
    said = texts(browser, ".message .content")
    assert said[0] == "the cat" and len(said) == 2
    figures = texts(browser, ".message .figures")[0]
    assert "12 tokens" in figures and "tokens/s" in figures and "KB" in figures and "prompt tokens from the cache" in figures
    assert fits(browser) and texts(browser, "#send") == ["Send"] and texts(browser, "#list li button:first-child") == ["the cat"]
    shot(browser, "chat-1280")


def test_a_conversation_is_kept_forked_and_opened_again(page, tmp_path):
    browser = page()
    say(browser, "the cat")
    say(browser, "and the hat")
    whole = texts(browser, ".message .content")
    browser.find_elements("css selector", ".message .who button")[1].click()
    assert texts(browser, ".message .content") == whole[:2] and texts(browser, "#list li button:first-child") == ["the cat (fork)", "the cat"]
    say(browser, "of the rat")
    browser.refresh()
    assert texts(browser, "#list li button:first-child") == ["the cat (fork)", "the cat"] and len(texts(browser, ".message")) == 4
    browser.find_elements("css selector", "#list li button:first-child")[1].click()
    assert texts(browser, ".message .content") == whole
    file = tmp_path / "saved.json"
    file.write_text(json.dumps({"title": "<b>old</b>", "kind": "chat", "messages": [{"role": "user", "content": "<img src=x onerror=alert(1)>"}]}))
    browser.find_element("id", "file").send_keys(str(file))
    WebDriverWait(browser, 60).until(lambda browser: texts(browser, ".message .content") == ["<img src=x onerror=alert(1)>"])
    file.write_text('{"title": 1}')
    browser.find_element("id", "file").send_keys(str(file))
    WebDriverWait(browser, 60).until(lambda browser: "no saved conversation" in browser.find_element("id", "figures").text)
    browser.get_log("browser")  # the reload asked without a key


def test_an_answer_is_stopped_with_escape(page):
    browser = page()
    browser.execute_script("document.getElementById('max_tokens').value = 60000")  # minutes: it cannot end by itself before the key
    browser.find_element("id", "ask").send_keys("the", Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda browser: len((texts(browser, ".message:last-child .content") or [""])[0]) > 20)
    browser.find_element("id", "ask").send_keys(Keys.ESCAPE)
    WebDriverWait(browser, 60).until(lambda browser: texts(browser, "#figures") == ["Stopped."] and texts(browser, "#send") == ["Send"])
    assert len(texts(browser, ".message")) == 2


def test_a_plain_text_goes_on(page):
    browser = page()
    browser.execute_script("const kind = document.getElementById('kind'); kind.value = 'text'; kind.onchange()")
    say(browser, "the cat sat")
    assert len(texts(browser, ".message")) == 2


def test_it_works_on_a_phone_in_the_dark(page):
    browser = page(scheme="dark", width=390, height=780)
    assert brightness(browser)[0] < brightness(browser)[1] and not browser.find_element("id", "side").is_displayed()
    say(browser, "the cat sat on the mat")
    assert fits(browser)
    shot(browser, "chat-390-dark")
    browser.find_element("id", "menu").click()
    assert browser.find_element("id", "side").is_displayed() and fits(browser)
    shot(browser, "chat-390-menu")
    browser.find_element("id", "new").click()
    assert not browser.find_element("id", "side").is_displayed() and texts(browser, ".message") == []


def test_what_the_server_refuses_is_shown_and_the_message_comes_back(page):
    browser = page()
    browser.execute_script("document.getElementById('max_tokens').value = 100000")
    browser.find_element("id", "ask").send_keys("the cat", Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda browser: "max_tokens" in browser.find_element("id", "figures").text)
    assert browser.find_element("id", "ask").get_attribute("value") == "the cat" and texts(browser, ".message") == []
    assert any("400" in line["message"] for line in browser.get_log("browser"))


def shot(browser, name):
    """Keep a picture where GAM_SCREENSHOTS says so."""
    if folder := os.environ.get("GAM_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
