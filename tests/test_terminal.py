"""What people see: tables that fit, characters that every console has, progress of long work, and no figure of a format that is only emulated."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from gam_lm.cli.completion import script
from gam_lm.cli.main import run
from gam_lm.cli.terminal import StandardError, show, show_anything
from gam_lm.experiments import measuring, training_speed
from gam_lm.experiments.measuring import possible
from gam_lm.runtime import progress as progress_module
from gam_lm.runtime.progress import progress

CPU = torch.device("cpu")
TABLE = """### What it shows

| Model | Parameters | Loss (nats) | PPL | Tokens/s | Seeds |
|---|--:|--:|--:|--:|--:|
| gam | 1,251,024 | **4.5436 ± 0.0101** | 94.02 | 7,605 | 3 |
| a\\|b &lt;c> | 1,253,120 | 4.7425 ± 0.0090 | 114.72 | 12,687 | 3 |
| *bigram counts* |  | 4.5873 | 98.23 |  |  |

A note.
"""


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def shown(monkeypatch, markdown, *, encoding="utf-8", columns=80, kind=Terminal):
    raw = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setenv("COLUMNS", str(columns))
        patched.setenv("TERM", "xterm")
        patched.setattr(sys, "stdout", kind(raw, encoding=encoding))
        show_anything()
        show(markdown)
        sys.stdout.flush()
        return re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue().decode(encoding))


def test_a_pipe_gets_the_markdown_as_it_is(monkeypatch):
    assert shown(monkeypatch, TABLE, kind=io.TextIOWrapper) == TABLE + "\n"


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_table_on_a_terminal_keeps_every_figure_whole_and_fits(encoding, columns, monkeypatch):
    text = shown(monkeypatch, TABLE, encoding=encoding, columns=columns)
    assert all(len(line) <= columns for line in text.splitlines())
    for figure in ("1,251,024", "4.5436 ± 0.0101", "114.72", "12,687", "98.23", "a|b <c>", "bigram counts", "What it shows", "A note."):
        assert figure.replace("±", "+-" if encoding == "ascii" else "±") in text, figure
    assert "*" not in text and "#" not in text and "The same for all: Seeds 3." in text
    right = [line.rstrip() for line in text.splitlines() if re.search(r"94\.02|114\.72|98\.23", line)]
    ends = {re.search(r"94\.02|114\.72|98\.23", line).end() for line in right}
    assert len(ends) == 1  # figures stand under each other


def test_prose_in_a_table_is_broken_between_words(monkeypatch):
    prose = "a sentence about what this model changes and where it comes from"
    text = shown(monkeypatch, f"| Name | What |\n|---|---|\n| gam | {prose} |\n| mamba | {prose[::-1]} |\n", columns=50)
    assert all(len(line) <= 50 for line in text.splitlines()) and all(word in text.split() for word in prose.split())


def test_what_one_row_alone_says_stays_in_the_table(monkeypatch):
    assert "The same for all" not in shown(monkeypatch, "| Model | Loss |\n|---|--:|\n| gam | 4.5 |\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("arguments", [["models"], ["--help"], ["train", "--help-all"], ["inspect", "cost", "small-cpu"], ["env"]])
def test_no_console_breaks(encoding, arguments, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(raw, encoding=encoding))
    monkeypatch.setenv("COLUMNS", "80")
    show_anything()
    try:
        assert run(arguments) == 0
    except SystemExit as done:
        assert done.code == 0
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding)


@pytest.mark.parametrize("arguments", [["models"], ["train", "--help-all"], ["compare", "--help"]])
def test_a_reader_that_leaves_ends_a_command_quietly(arguments):
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([sys.executable, "-W", "error", "-m", "gam_lm", *arguments], stdout=write, stderr=subprocess.PIPE, text=True) as done:
        os.close(write)
        _, said = done.communicate(timeout=240)
    assert (done.returncode, said) == (0, "")


def test_a_line_that_holds_for_all_models_is_said_once(capsys):
    handler, record = StandardError(), logging.makeLogRecord({"msg": "precision fp32: no bf16", "levelno": logging.INFO})
    warning = logging.makeLogRecord({"msg": "it diverged", "levelno": logging.WARNING})
    for each in (record, record, warning, warning):
        handler.emit(each)
    assert capsys.readouterr().err.splitlines() == ["precision fp32: no bf16", "it diverged", "it diverged"]


def test_work_in_a_pipe_says_what_is_under_way(caplog):
    caplog.set_level(logging.INFO, logger="gam_lm")
    with progress("training speed", 3, "models") as bar:
        bar.advance()
        bar.now("mamba, batch 8")
    assert caplog.messages == ["training speed 2 of 3: mamba, batch 8"]


def test_a_line_says_no_time_left_where_nothing_is_done_yet(caplog, monkeypatch):
    caplog.set_level("INFO", "gam_lm")
    monkeypatch.setattr("gam_lm.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    with progress("trials", 4, "trials") as bar:
        bar.advance(0)
        bar.advance()
    assert [" left" in message for message in caplog.messages[:2]] == [False, True]


def test_work_inside_other_work_shares_its_display(monkeypatch):
    terminal = Terminal(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("trainings", 2, "runs") as outer:
        with progress("steps", 10) as inner:
            inner.advance(3, "loss 4.1")
            assert inner.bars is outer.bars and [task.description for task in outer.bars.tasks] == ["trainings", "steps"]
            assert outer.bars.tasks[1].completed == 3
        outer.advance()
        assert [task.description for task in outer.bars.tasks] == ["trainings"]
    assert progress_module._open == []


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setattr(measuring, "has_bf16", lambda device: False)


def test_bf16_that_would_be_emulated_is_left_out_with_one_line(no_bf16, caplog):
    assert possible([("fp32", "eager"), ("bf16", "eager"), ("bf16", "eager")], CPU) == [("fp32", "eager")]
    (line,) = caplog.messages
    assert "bf16 variants are left out: this processor has no bf16 instructions" in line


def test_training_steps_are_measured_in_fp32_where_bf16_would_be_emulated(no_bf16, caplog, monkeypatch):
    assert training_speed.variants_of(("plain", "eager", "compiled"), CPU) == [("plain", "fp32"), ("eager", "fp32"), ("compiled", "fp32")]
    assert len(caplog.messages) == 1 and "measured in fp32" in caplog.messages[0]
    monkeypatch.setattr(measuring, "has_bf16", lambda device: True)
    for faster, trained in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(training_speed, "trains_faster_in_bf16", lambda device, faster=faster: faster)
        assert training_speed.variants_of(("plain", "eager"), CPU) == [("plain", "fp32"), ("plain", "bf16"), ("eager", trained)]
    assert training_speed.variants_of(("eager", "compiled"), CPU, ["bf16"]) == [("eager", "bf16"), ("compiled", "bf16")]


def test_a_measurement_of_emulated_bf16_alone_is_refused(no_bf16, tmp_path, capsys, caplog):
    tiny = ["--hidden-size", "16", "--num-hidden-layers", "1", "--vocab-size", "64", "--models", "gam-static", "--device", "cpu"]
    assert run(["bench-decode", "--precisions", "bf16", "--contexts", "8", "--batch-sizes", "1", "--out", str(tmp_path / "decode"), *tiny]) == 2
    said = capsys.readouterr().err
    assert any("bf16 variants are left out" in each for each in caplog.messages) and "gam: nothing could be measured" in said and "Traceback" not in said
    assert run(["scale", "--precision", "bf16", "--lengths", "16", "--out", str(tmp_path / "scale"), *tiny]) == 2
    assert "precision is 'bf16'" in capsys.readouterr().err
    assert json.loads((tmp_path / "decode" / "results.json").read_text())["rows"] == []


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    file = tmp_path_factory.mktemp("shell") / "gam.bash"
    file.write_text(script())
    return file


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("tra", {"train"}), ("inspect tr", {"trace"}), ("train --min", {"--minutes"}), ("inspect slots --remove", {"--remove", "--remove-tokens"}),
        ("train --gam.write m", {"mean"}), ("bench-decode --precisions b", {"bf16"}), ("generate runs/x --top-", {"--top-k", "--top-p"}), ("train my_te", set()),
    ],
)  # fmt: skip
def test_the_shell_completes_verbs_flags_and_choices(completion, typed, wanted):
    words = ["gam", *typed.split(" ")]
    ask = f"source {completion}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _gam; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert (set(done.stdout.split()), done.stderr) == (wanted, "")
