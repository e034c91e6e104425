"""Stop `gam bench`, `gam tune` and `gam recall` at random moments, give each command again, and compare what it leaves with what it leaves when nobody stops it.

    python tests/soak/commands.py --runs 100 --seed 1

Each command is stopped up to three times by SIGKILL, SIGTERM or SIGINT. Times and tokens a second aside, results.json must hold the same rows, and weights and
losses of blocks the same bytes. The answer is one JSON object; the exit code is 1 where something differs. Linux and macOS only.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kills import differences, forked, keep, stop_at_random, wait

# What the commands load: once here, not in every process.
import gam_lm.experiments.benchmark
import gam_lm.experiments.recall
import gam_lm.experiments.tune
import gam_lm.report.plots
import gam_lm.report.recall
import gam_lm.report.tables
import gam_lm.report.tune  # noqa: F401
from gam_lm.cli.main import VERBS, run, verb_class

SIZE = ["--hidden-size", "8", "--num-hidden-layers", "1", "--gam.num-heads", "2", "--gam.num-memory-slots", "8", "--device", "cpu", "--precision", "fp32", "--compile", "off"]
TIMED = re.compile(r"seconds|_ms$|per_second|environment|memory_mb|command|started|commit")
"""Keys of what depends on the machine's speed, or on when and how a command was given."""


def commands(text):
    """The flags of each command, without those of its folder."""
    corpus = ["--data", str(text), "--context", "16", "--vocab-size", "270", "--no-timing"]
    return {
        "bench": ["--models", "gam", "gam-static", "--steps", "8", "--batch-size", "2", "--checkpoint-every", "3", "--validate-every", "4", *corpus],
        "tune": ["--models", "gam", "gam-static", "--trials", "2", "--widenings", "0", "--steps", "4", "--batch-size", "2", *corpus[:-1]],
        "recall": ["--models", "gam", "--pairs", "2", "4", "--length", "16", "--batch-size", "2", "--steps", "6", "--warmup-steps", "1"],
    }


def given(verb, flags, out):
    """A process that runs a command as a person does; its id."""

    def work():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return run([verb, *flags, "--out", str(out), *SIZE])

    return forked(work)


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if not TIMED.search(key)}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def content(out):
    """What must be the same: JSON without times, bytes of weights and losses, and the names of all files but locks."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or path.name.endswith(".lock"):
            continue
        if path.suffix == ".json":
            value = timeless(json.loads(path.read_text()))
            found[name] = sorted(json.dumps(row, sort_keys=True) for row in value.pop("rows", [])), value
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes() if path.suffix in (".safetensors", ".npy") else None
    for name in [name for name in found if name.endswith("progress.json")]:
        found[name][1].pop("sha256", None)  # of the times as well
    return found


def attack(verb, flags, folder, runs, seed):
    """The kills of a command, and the runs that differ."""
    times = []
    for i in range(2):
        begun = time.monotonic()
        if wait(given(verb, flags, folder / f"{verb}-whole-{i}")):
            raise RuntimeError(f"gam {verb} failed where nobody stopped it")
        times.append(time.monotonic() - begun)
    expected = content(folder / f"{verb}-whole-0")
    failures = [{"run": "whole", "differs": wrong}] if (wrong := differences(expected, content(folder / f"{verb}-whole-1"))) else []
    rng, kills = random.Random(f"{verb} {seed}"), 0
    for number in range(runs):
        out = folder / f"{verb}-{number}"
        stopped, trail, wrong = stop_at_random(lambda: given(verb, flags, out), rng, min(times))  # noqa: B023 (called at once)
        kills += stopped
        code = wait(given(verb, flags, out))
        wrong += [f"exit code {code}"] if code else differences(expected, content(out))
        if wrong:
            failures.append({"run": number, "trail": trail, "differs": wrong})
        shutil.rmtree(out, ignore_errors=True)
    return {"kills": kills, "failures": failures, "seconds_of_a_run": round(min(times), 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="of each command")
    parser.add_argument("--verbs", nargs="+", default=["bench", "tune", "recall"])
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, help="folder of the results.json to add the counts to")
    chosen = parser.parse_args()
    for verb in VERBS:
        verb_class(verb)
    report = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        text = folder / "text.txt"
        text.write_text("".join(f"alpha beta {i % 7} gamma delta\n" for i in range(300)))
        for verb in chosen.verbs:
            report[verb] = attack(verb, commands(text)[verb], folder, chosen.runs, chosen.seed)
            if chosen.out is not None:
                keep(chosen.out, f"gam {verb}", report[verb])
    print(json.dumps(report, indent=1))
    return 1 if any(part["failures"] for part in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
