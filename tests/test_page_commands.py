"""The commands of the pages run: in the order in which its page gives it, in a folder with nothing but what the page supposes, at a size that a test can wait for."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import PAGES, ROOT, TEXT, commands, make_home

from gam_lm.cli.main import VERBS, parse, run
from gam_lm.runtime import isolation

TRAINED = "--steps 2 --batch-size 2 --context 32"
TINY = "--hidden-size 32 --num-hidden-layers 1"
SMALLER = {
    "train": f"{TRAINED} {TINY} --vocab-size 300", "generate": "--max-new-tokens 4", "chat": "--max-new-tokens 4", "bench": f"{TRAINED} {TINY} --vocab-size 300 --compile off",
    "tune": f"{TRAINED} {TINY} --vocab-size 300 --compile off --trials 1 --widenings 0", "ablate": f"{TRAINED} {TINY} --vocab-size 300 --data my_texts",
    "recall": f"--steps 2 --batch-size 2 {TINY} --pairs 4 --length 32", "scale": f"--lengths 16 32 --warmup 1 --iterations 1 {TINY}",
    "bench-train": f"--models gam --batch-sizes 2 --context 16 --rounds 1 --warmup 1 --variants plain eager {TINY} --vocab-size 300",
    "bench-decode": f"--models gam transformer --contexts 8 16 --batch-sizes 1 --variants eager --steps 2 --warmup 1 {TINY} --vocab-size 300",
    "bench-gpu": "--dry --minutes 0.02", "bench-distributed": "--processes 2 --steps 2 --speed-steps 1 --only equality speed", "inspect slots": "--remove 1 --remove-tokens 64",
    "serve": "--port 0",
}  # fmt: skip
"""By verb: flags behind those of the page, which they replace."""

OUR_TEXT = ("wikitext-2", "tinystories", "books")
"""Corpora from the network or from a folder of one's own, for which our text stands."""

PRESET_TEXT = ("laptop", "small-cpu", "paper-wikitext2")
"""Presets whose corpus is large or from the network; the same."""

NOT_RUN = {
    r"pip install .*": "the environment is what `make test` made; the extras are checked in test_docs",
    r"eval .*": "tests/test_terminal.py runs what `gam completion` prints",
    r"make .*": "each is a target of the Makefile, which is checked in test_docs",
    r"torchrun .*": "processes of a run are tested in test_distributed",
    r"gam eval runs/a runs/b --tasks .*": "the tasks' files are not in the repository; tests/test_downstream.py makes some",
    r"gam eval runs/mine --harness .*": "the tasks are on the network; tests/test_harness.py runs one of its own",
    r"python tests/load/.*": "minutes of load, against a server",
}

# Each takes more than some seconds.
SLOW = {"compare.md", "huggingface.md", "many-machines.md", "memory-limits.md", "memory-worth.md", "parts.md", "quickstart.md", "serve.md", "speed.md"}

MADE_ELSEWHERE = {"inspect.md": {"runs/compared": "laptop-0.2", "runs/scaling": "scaling/cpu"}}
"""Folders that another page makes, and which of the committed results stand for them."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    home = make_home(tmp_path)
    for name, text in (("my_text", TEXT), ("other_text", TEXT.replace("cat", "fox")), ("book", TEXT)):
        (home / f"{name}.txt").write_text(text * 400)
    turns = '{"messages": [{"role": "user", "content": "Who sat on the mat?"}, {"role": "assistant", "content": "The cat."}]}\n'
    (home / "conversations.jsonl").write_text(turns * 60)
    (home / "my_parquet_files").mkdir()
    for number in range(2):
        pq.write_table(pa.table({"text": [TEXT * 40] * 8}), home / "my_parquet_files" / f"train-0000{number}.parquet")
    shutil.copytree(ROOT / "examples", home / "examples")
    (home / "results").symlink_to(ROOT / "results")  # is read alone: see `arguments_of`
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    return home


@pytest.fixture
def quick(monkeypatch):
    """What is not under test here: processes of their own for each measurement, peaks of the machine, and waiting for requests."""

    def here(function, parameters, *, isolated, seconds, memory_mb):
        return isolation.measured(function, parameters, isolated=False, seconds=seconds, memory_mb=memory_mb)

    for module in ("measuring", "decode"):
        monkeypatch.setattr(f"gam_lm.experiments.{module}.measured", here)
    monkeypatch.setattr("gam_lm.experiments.training_speed.matmul_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr("gam_lm.experiments.decode.memory_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("gam_lm.serve.connections.make_server", lambda app, limits: SimpleNamespace(run=lambda sockets: [each.close() for each in sockets]))


def arguments_of(command):
    """A command of a page at the size of a test; nothing is written to the committed results."""
    words = shlex.split(command, comments=True)[1:]
    words = ["my_texts" if before in ("--data", "prepare") and word in OUR_TEXT else word for before, word in zip(["", *words], words, strict=False)]
    verb = next(" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in VERBS)
    for flag in {"--out", "--plot", "--tuned"} & set(words):  # a study is the one that the page's own command made
        place = words.index(flag) + 1
        words[place] = re.sub("^results/", "written/", words[place])
    more = SMALLER.get(verb, "").split()
    if "--minutes" in words and "--steps" in more:  # which says how long the run is
        place = words.index("--minutes")
        del words[place : place + 2]
    if "--from" in words:  # the model is there
        more = TRAINED.split()
    if "--chat" in words:
        more = [*more[:-1], "128"]
    if verb in ("bench", "tune") and "--data" not in words:
        assert "--preset" not in words or words[words.index("--preset") + 1] in PRESET_TEXT
        more += ["--data", "my_texts"]
    if "--context-use" in words:
        more += ["--targets", "8"]
    if "--test-lengths" in words:
        more += ["--test-lengths", "64"]
    if any(flag.name == "device" for flag in flags_of_verb(verb)) and verb != "inspect cost":
        more += ["--device", "cpu"]
    return [*words, *more]


def flags_of_verb(verb):
    from gam_lm.cli.flag_list import flags_of
    from gam_lm.cli.main import verb_class

    return list(flags_of(verb_class(verb)))


def in_a_process(words):
    """Where a command starts others by its own words, or registers a mixer."""
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
        if any(not any(re.fullmatch(each, command) for each in NOT_RUN) for command in commands(page))
    ],
)
def test_the_commands_of_a_page_run_in_their_order(page, folder, quick, monkeypatch, capsys):
    for place, made in MADE_ELSEWHERE.get(page.name, {}).items():
        (folder / place).mkdir(parents=True)
        shutil.copy(ROOT / "results" / made / "results.json", folder / place)
    for command in commands(page):
        if any(re.fullmatch(each, command) for each in NOT_RUN):
            continue
        if command.startswith("python "):
            in_a_process([sys.executable, *shlex.split(command, comments=True)[1:]])
            continue
        words = arguments_of(command)
        if "--import" in words or "--workers" in words:
            in_a_process([sys.executable, "-m", "gam_lm", *words])
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who sat on the mat?\n/new\nWho?\n"))
        assert run(words) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
        said = capsys.readouterr().out
        assert said.strip(), command  # each says what it did
    written = {path.name for path in folder.iterdir()}
    for name in re.findall(r"--out ([\w./-]+)", "\n".join(commands(page))):
        if not any(re.fullmatch(each, command) for command in commands(page) if f"--out {name}" in command for each in NOT_RUN):
            place = folder / re.sub("^results/", "written/", name)
            assert place.exists(), (name, written)


def test_what_is_not_run_is_on_a_page_and_is_understood():
    every = [command for page in PAGES for command in commands(page)]
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in every), f"no page has {pattern}"
    assert {page.name for page in PAGES} >= SLOW
    for command in every:
        if command.startswith("gam ") and "--import" not in command:
            assert parse(arguments_of(command))
