"""Every snippet of the documentation works: Python is run, commands are parsed, and the site builds without a network."""

import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from browsing import brightness, chromium, fits  # noqa: F401 (a fixture)
from pages import BLOCK, PAGES, ROOT, blocks, commands, make_home

from gam_lm.cli.main import VERBS, parse, run


def test_snippets_are_of_the_kinds_that_are_tested():
    assert {language for page in PAGES for language, _ in BLOCK.findall(page.read_text())} <= {"python", "sh", ""}


@pytest.mark.parametrize(("page", "command"), [(page.name, command) for page in PAGES for command in commands(page)])
def test_commands_are_understood(page, command):
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of one command
        words.pop(0)
    name, *arguments = words
    if name == "gam" and "--import" in arguments:  # in a process of its own: what it registers stays in one
        code = "import sys; from gam_lm.cli.main import parse; from gam_lm.runtime.imports import take_imports; assert parse(take_imports(sys.argv[1:]))"
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    elif name == "eval":  # of what `gam completion` prints
        assert parse(shlex.split(command.removeprefix('eval "$(').removesuffix(')"'))[1:])
    elif name == "gam":
        assert parse(arguments)
    elif name == "pip" and arguments[-1].startswith("gam-lm"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"[\w-]+", arguments[-1].removeprefix("gam-lm"))) <= extras.keys()
    elif name == "pip" and "wheels" in arguments:  # for a machine without network
        assert arguments[0] in ("download", "install") and all(re.search(rf'^ *"{each}\b', (ROOT / "pyproject.toml").read_text(), re.M) for each in arguments[-2:])
    elif name == "make":
        for target in (each for each in arguments if "=" not in each):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif name == "torchrun":
        assert parse(arguments[arguments.index("gam_lm") + 1 :])
    elif name == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert command.startswith("pip install torch --index-url https://download.pytorch.org/whl/")


# The log is history: its commands are those of their day.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_verbs_and_flags_in_the_text_exist(page, capsys):
    for command in re.findall(r"`gam ([^`]+)`", page.read_text()):
        words = shlex.split(command)
        verb = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in VERBS), None)
        if words[0] in ("VERB", "--help"):
            continue
        assert verb is not None, command
        with pytest.raises(SystemExit):
            run([*verb.split(), "--help-all"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--")), command


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def server(home, request):
    """What the page on serving supposes to be running; a port of its own."""
    if "serve.md" not in request.node.name:
        yield None
        return
    command = [sys.executable, "-m", "gam_lm", "serve", str(home / "runs" / "mine"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield re.search(r"http://\S+", process.stdout.readline())[0]
    process.terminate()
    process.wait(timeout=120)
    process.stdout.close()


class Hub:
    """Takes what is uploaded and names the files."""

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **_):
        return type("Repository", (), {"repo_id": repo_id})

    def file_exists(self, *_, **__):
        return False

    def upload_folder(self, *, repo_id, folder_path, **_):
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder_path.iterdir()}
        return f"https://hub/{repo_id}"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in ("huggingface.md", "serve.md") else [])
        for page in PAGES
        if blocks(page, "python")
    ],
)
def test_python_snippets_run_one_after_the_other(page, home, server, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    names = {}
    for code in blocks(page, "python"):
        code = code.replace("http://127.0.0.1:8000/v1", server) if server else code
        exec(compile(code, page.name, "exec"), names)
        said = capsys.readouterr().out
        for printed in re.findall(r"print\(.*\)  # (.+)", code):  # what a snippet says it prints
            assert printed in said
    assert names


def test_the_site_builds_without_a_warning_with_its_pictures_and_asks_no_other_host(tmp_path):
    pytest.importorskip("zensical", reason="pip install 'gam-lm[dev]'")
    make_site(tmp_path)
    site = tmp_path / "site"
    for page in PAGES[1:]:
        html = (site / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', html)
        for picture in re.findall(r'<img[^>]*src="([^"]+)"', html):
            assert (site / re.sub(r"^(\.\./)+", "", picture)).is_file(), f"{page.name} shows {picture}"
    assert "num_memory_slots" in (site / "api.html").read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.slow
def test_the_site_is_searched_fits_a_phone_and_is_dark_where_the_system_is(tmp_path, chromium):  # noqa: F811
    pytest.importorskip("zensical", reason="pip install 'gam-lm[dev]'")
    make_site(tmp_path)
    handler = partial(QuietHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for width in (1280, 390):
            chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
            for page in ("index", "quickstart", "memory-worth", "speed", "serve"):
                chromium.get(f"{address}/{page}.html")
                assert fits(chromium), (page, width)
                wide = chromium.execute_script(WIDER_THAN_ITS_COLUMN)
                assert not wide, (page, width, wide)
        brightnesses = []
        for scheme in ("light", "dark"):
            chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            chromium.get(f"{address}/index.html")
            brightnesses.append(brightness(chromium))
        (light, ink), (dark, pale) = brightnesses
        assert light > ink and dark < pale
        assert chromium.get_log("browser") == []
        # The search finds a page by a word that stands on it.
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False})
        chromium.get(f"{address}/index.html")
        assert not chromium.execute_script(SEARCH_RESULT)
        chromium.find_element("tag name", "body").send_keys("/")
        assert wait_for(chromium, "return !!document.activeElement && document.activeElement !== document.body")
        chromium.switch_to.active_element.send_keys("Prometheus")
        assert wait_for(chromium, SEARCH_RESULT)
        server.shutdown()


WIDER_THAN_ITS_COLUMN = """
    const column = document.querySelector("article");
    const right = column.getBoundingClientRect().right + 1;
    const frame = (box) => box === column || ["auto", "scroll"].includes(getComputedStyle(box).overflowX) ? box : frame(box.parentElement);
    return [...column.querySelectorAll("table")].filter((table) => Math.min(table.getBoundingClientRect().right, frame(table).getBoundingClientRect().right) > right)
      .map((table) => table.innerText.slice(0, 40));
"""
"""Tables that reach out of the text; one that scrolls in a frame of its own does not."""

SEARCH_RESULT = """
    const links = (root) => [...root.querySelectorAll("*")].flatMap(
      (each) => [...(each.tagName === "A" ? [each.innerText] : []), ...(each.shadowRoot ? links(each.shadowRoot) : [])]);
    return links(document).some((text) => text.includes("Prometheus"));
"""


def wait_for(browser, script, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if browser.execute_script(script):
            return True
        time.sleep(0.2)
    return False


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def make_site(folder):
    """What `make docs-build` makes, in a folder of its own."""
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "Makefile"):
        shutil.copy(ROOT / name, folder)
    for picture in (ROOT / "results").rglob("*.svg"):
        target = folder / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    tools = folder / "tools"  # what .venv/bin has, whatever runs the tests
    tools.mkdir()
    (tools / "zensical").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m zensical "$@"\n')
    (tools / "zensical").chmod(0o755)
    done = subprocess.run(["make", "-o", ".venv/installed-dev", "docs-build", "BIN=tools"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in PAGES[1:]} <= listed
