"""Fixtures of tests in headless Chromium, Debian's packages chromium and chromium-driver: import ``chromium`` and ``show``."""

import re
import shutil

import pytest


@pytest.fixture(scope="module")
def chromium():
    """A browser; without one the test is skipped."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'gam-lm[dev]'")
    from selenium.webdriver.chrome.service import Service

    binary, driver = (next(filter(None, map(shutil.which, names)), None) for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)))
    if binary is None or driver is None:
        pytest.skip("no browser: install chromium and chromium-driver (apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def show(chromium):
    """Open a file; at the end nothing may have been said on the console."""

    def opened(path, *, scheme="light", width=1200):
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
        chromium.get(path.as_uri())
        return chromium

    yield opened
    assert chromium.get_log("browser") == []


def texts(browser, selector):
    """The text of all elements, also of those that are hidden."""
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent.trim())", selector)


def fits(browser):
    return browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def brightness(browser):
    """Sums of red, green and blue of the page and of its text."""
    colours = browser.execute_script("const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]")
    return [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
