"""Every snippet of the documentation works: Python is run, commands are parsed, and the site builds without a network."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from gam_lm.checkpoint import save_model
from gam_lm.cli.main import VERBS, parse, run
from gam_lm.config import ModelConfig
from gam_lm.data.tokenizer import train_bpe
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.model import LanguageModel

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = "Once upon a time there was a cat. It sat on the mat, and the dog sat on the log.\n"


def blocks(page, language):
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def commands(page):
    return [line for code in blocks(page, "sh") for line in code.splitlines() if line.strip() and not line.startswith("#")]


def test_snippets_are_of_the_kinds_that_are_tested():
    assert {language for page in PAGES for language, _ in BLOCK.findall(page.read_text())} <= {"python", "sh", ""}


@pytest.mark.parametrize(("page", "command"), [(page.name, command) for page in PAGES for command in commands(page)])
def test_commands_are_understood(page, command):
    name, *arguments = shlex.split(command, comments=True)
    if name == "gam" and "--import" in arguments:  # in a process of its own: what it registers stays in one
        code = "import sys; from gam_lm.cli.main import parse; from gam_lm.runtime.imports import take_imports; assert parse(take_imports(sys.argv[1:]))"
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    elif name == "gam":
        assert parse(arguments)
    elif name == "pip" and arguments[-1].startswith("gam-lm"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"[\w-]+", arguments[-1].removeprefix("gam-lm"))) <= extras.keys()
    elif name == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
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
    """A folder as the pages suppose it: a text and a small model trained on it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_texts").mkdir()
    for i in range(40):
        (folder / "my_texts" / f"{i:02}.txt").write_text(TEXT * 20)
    tokenizer = train_bpe([TEXT * 4], 300)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=2, options=(GAMOptions(num_memory_slots=8, num_heads=2),)
    )
    save_model(folder / "runs" / "mine", LanguageModel(config), tokenizer)
    return folder


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


SMALL = ["--steps", "2", "--batch-size", "2", "--context", "16", "--vocab-size", "300", "--hidden-size", "16", "--num-hidden-layers", "1", "--device", "cpu"]
"""Behind a command that trains: what a test can wait for."""


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_commands_of_a_page_run_in_their_order_in_an_empty_folder(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_text.txt").write_text(TEXT * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for line in blocks(ROOT / page, "sh")[0].splitlines():
        name, *arguments = shlex.split(line, comments=True)
        if name != "gam":
            continue
        assert run([*arguments, *(SMALL if arguments[0] == "train" else ["--device", "cpu"])]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "my_text" / "model.safetensors").is_file()
    assert page != "README.md" or "</html>" in (tmp_path / "trace.html").read_text()


class Hub:
    """Takes what is uploaded and names the files."""

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **_):
        return type("Repository", (), {"repo_id": repo_id})

    def file_exists(self, *_):
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


def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    pytest.importorskip("zensical", reason="pip install 'gam-lm[dev]'")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES[1:]:
        html = (tmp_path / "site" / page.with_suffix(".html").name).read_text()
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', html)
    assert "num_memory_slots" in (tmp_path / "site" / "api.html").read_text()


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in PAGES[1:]} <= listed
