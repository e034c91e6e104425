"""An empty folder with a text in it, for the tests of `gam train` and what follows it."""

import random

import gam_lm.training.planning as planning
from gam_lm.cli.main import run

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "small", "birds", "sing", "in", "old", "trees", "and", "nobody", "listens"]
SMALL = ["--hidden-size", "16", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--context", "16", "--batch-size", "4", "--vocab-size", "280",
         "--precision", "fp32", "--device", "cpu"]  # fmt: skip


def make_folder(tmp_path, monkeypatch):
    """Go to an empty folder with a text in it, on a machine whose steps take a tenth of a second, whatever else runs on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "step_times", lambda step, device, **options: [100.0] if step() else [])
    draw = random.Random(0)
    (tmp_path / "my_text.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(400)), encoding="utf-8")
    return tmp_path


def refused(capsys, arguments):
    """Run a command that must fail on the user's input; its one line."""
    assert run(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gam: ") and "nats/token" not in line]
    assert len(errors) == 1
    return errors[0]
