"""Numbers are checked at the door, for every verb; printing fails for no terminal and no pipe."""

import dataclasses
import io
import math
import os
import subprocess
import sys
import typing

import pytest

from gam_lm.cli.main import VERBS, parse, run, verb_class
from gam_lm.cli.numbers import check_numbers
from gam_lm.cli.terminal import show_anything
from gam_lm.errors import InputError


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("scale --lengths 64 0", "lengths"), ("scale --seconds nan", "seconds"), ("bench-train --limit-seconds inf", "limit_seconds"),
        ("bench --margin nan", "margin"), ("bench --seeds 0 -1", "seeds"), ("bench --betas nan 0.9", "betas"), ("bench --clip inf", "clip"),
        ("recall --gap-power nan", "gap_power"), ("recall --pairs 4 -1", "pairs"), ("tune --trials 0", "trials"), ("tune --widenings -1", "widenings"),
        ("bench --train-rows -4", "train_rows"), ("bench-gpu --minutes -1", "minutes"), ("ablate --seeds -1", "seeds"), ("bench --vocab-size 0", "vocab_size"),
        ("bench-decode --contexts -5", "contexts"), ("bench --epochs inf", "epochs"), ("bench --gam.chunk-size 0", "chunk_size"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_one_line_before_anything_is_done(command, field, tmp_path, capsys):
    assert run([*command.split(), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("gam: ") and field in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("eval RUN --context -5", "context"), ("eval RUN --batch-size 0", "batch_size"), ("eval RUN --context-use 0", "context_use"),
        ("serve RUN --port 70000", "port"), ("serve RUN --prefill-tokens 0", "prefill_tokens"), ("serve RUN --cache-mb -1", "cache_mb"),
        ("inspect cost laptop --context 0", "context"), ("inspect receptive-field laptop --length -1", "length"), ("inspect trace RUN --tokens 1", "tokens"),
        ("inspect slots RUN --remove -1", "remove"), ("read RUN TEXT --every 0", "every"), ("compare a b --margin inf", "margin"),
        ("data prepare x --vocab-size 0", "vocab_size"),
    ],
)  # fmt: skip
def test_so_is_one_of_a_verb_that_reads(command, field, capsys):
    assert run(command.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"gam: {field} is ")


def test_every_float_of_every_verb_refuses_nan():
    for name in VERBS:
        kind = verb_class(name)
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            if float in typing.get_args(hints[field.name]) or hints[field.name] is float:
                verb = object.__new__(kind)
                for each in dataclasses.fields(kind):
                    object.__setattr__(verb, each.name, math.nan if each is field else None)
                with pytest.raises(InputError):
                    check_numbers(verb)


def test_the_defaults_of_every_measuring_verb_are_in_range(tmp_path):
    for name in ("bench", "tune", "ablate", "recall", "scale", "bench-train", "bench-decode"):
        for verb in parse([name, "--out", str(tmp_path)]):
            check_numbers(verb)


def start(arguments, **options):
    return subprocess.Popen([sys.executable, "-W", "error", "-m", "gam_lm", *arguments], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_characters_shows_escapes(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    show_anything()
    print("Σ λ ≤ \udc80")
    sys.stdout.flush()
    assert b"<=" in raw.getvalue() and b"\\u03a3" in raw.getvalue() and b"\\udc80" in raw.getvalue()


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with start(["models"], stdout=write) as done:
        os.close(write)
        _, said = done.communicate(timeout=240)
    assert done.returncode == 0 and not said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_device_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full, start(["models"], stdout=full) as done:
        _, said = done.communicate(timeout=240)
    assert done.returncode == 2 and len(said.splitlines()) == 1 and "no space" in said
