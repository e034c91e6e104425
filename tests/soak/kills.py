"""Kill training runs, let them go on, and compare what they leave with a run that nobody stopped, byte by byte.

    python tests/soak/kills.py --operations           a kill before every single file operation of a run
    python tests/soak/kills.py --random 500 --seed 1  kills, terminations and interrupts at random moments, up to three a run

The answer is one JSON object; the exit code is 1 where a run differs. Processes are forked from one that has imported everything, so that a run takes a
fraction of a second. Linux and macOS only.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch._dynamo  # which the first optimiser imports: once here, not in every process

from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig

RECIPE = TrainConfig(
    steps=6, batch_size=2, context=16, warmup_steps=2, precision="fp32", validate_every=4, checkpoint_every=3, optimizer="muon", schedule="wsd",
    cooldown=0.5, ema=0.8, shuffle_documents=True,
)  # fmt: skip
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}
PATIENCE = 60.0


def make_corpus(folder):
    rng = random.Random(0)
    folder.mkdir()
    for split, count in (("train", 60), ("valid", 5)):
        documents = [{"text": " ".join(rng.choices(["alpha", "beta", "gamma", "delta"], k=rng.randint(5, 40)))} for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    return prepare(str(folder), vocab_size=260, cache=folder / "cache")


def train(corpus, run):
    model = new_model(ModelConfig(vocab_size=corpus.vocab_size, hidden_size=8, num_hidden_layers=1, dropout=0.1), 0)
    fit(model, corpus, RECIPE, run)


def die_before(operation, run):
    """SIGKILL before the n-th operation on a file in the run directory."""
    seen = 0

    def count():
        nonlocal seen
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def look(event, arguments):
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return  # reading changes nothing: a kill before it is a kill before the next change
        if event in FILE_EVENTS and str(run) in os.fspath(arguments[0] if not isinstance(arguments[0], int | bytes) else ""):
            count()

    sync = os.fsync

    def counted_sync(handle):
        count()
        sync(handle)

    os.fsync = counted_sync
    sys.addaudithook(look)


def start(corpus, run, operation=None):
    """A process that trains; its id."""

    def work():
        if operation is not None:
            die_before(operation, run)
        train(corpus, run)

    return forked(work)


def forked(work):
    """A process that does ``work`` and exits with the code that it returns, None being 0; its id."""
    asked = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)  # one that comes at once waits until the new process can answer it
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, asked)
        return child
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, asked)
        torch.set_num_threads(1)
        code = work() or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child):
    """The exit code, negative for a signal. Raises RuntimeError for one that hangs."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise RuntimeError("a run hangs")


def content(run):
    """Every file of a run directory; times left out."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            found[name] = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]
        elif path.name == "progress.json":
            progress = json.loads(path.read_text())
            curve = [{key: value for key, value in point.items() if key != "seconds"} for point in progress.pop("curve")]
            found[name] = {key: value for key, value in progress.items() if key not in ("seconds", "sha256")} | {"curve": curve}
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def differences(one, other):
    return [name for name in sorted({*one, *other}) if name not in one or name not in other or one[name] != other[name]]


def finish(corpus, run, expected, trial):
    """Let a run go on to its end and say in what it differs."""
    code = wait(start(corpus, run))
    found = {} if code else content(run)
    shutil.rmtree(run, ignore_errors=True)
    wrong = [f"exit code {code}"] if code else differences(expected, found)
    return [] if not wrong else [{**trial, "differs": wrong}]


def at_every_operation(corpus, folder, expected):
    kills, failures, operation = 0, [], 0
    while True:
        operation += 1
        run = folder / f"operation-{operation}"
        code = wait(start(corpus, run, operation))
        failures += finish(corpus, run, expected, {"operation": operation})
        if code == 0:  # the run has fewer operations
            return {"kills": kills, "failures": failures}
        if code != -signal.SIGKILL:
            failures.append({"operation": operation, "differs": [f"exit code {code} before the kill"]})
        kills += 1


def at_random(corpus, folder, expected, runs, seed, seconds):
    rng, kills, failures = random.Random(seed), 0, []
    for number in range(runs):
        run = folder / f"random-{number}"
        stopped, trail, wrong = stop_at_random(lambda: start(corpus, run), rng, seconds)  # noqa: B023 (called at once)
        kills += stopped
        failures += [{"run": number, "trail": trail, "differs": [each]} for each in wrong]
        failures += finish(corpus, run, expected, {"run": number, "trail": trail})
    return {"kills": kills, "failures": failures}


def stop_at_random(begin, rng, seconds):
    """Begin up to three times and stop each at a random moment: how many were stopped, how, and what was wrong."""
    kills, trail, wrong = 0, [], []
    for _ in range(rng.randint(1, 3)):
        how, delay = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), rng.uniform(0, seconds)
        child = begin()
        time.sleep(delay)
        os.kill(child, how)  # nobody has waited for it: the id is still its own
        code = wait(child)
        trail.append([how.name, round(delay, 3), code])
        kills += code != 0
        if code not in (0, 130, -how):
            wrong.append(f"exit code {code}")
    return kills, trail, wrong


KEPT = {"operations": "before every file operation", "random": "at random moments"}


def keep(out, variant, report):
    """Add the kills and the runs that differ to the row that is there."""
    from gam_lm.results import Results
    from gam_lm.runtime.measure import environment

    results = Results.open(out / "results.json", command=shlex.join(["python", *sys.argv]), environment=environment(), corpus=None)
    row = {"model": "gam", "task": "kills", "variant": variant}
    before = results.find(row) or {}
    counts = {"kills": report["kills"], "differing": len(report["failures"])}
    results.add(row | {key: before.get(key, 0) + value for key, value in counts.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", action="store_true", help="kill before every file operation")
    parser.add_argument("--random", type=int, default=0, metavar="RUNS", help="runs that are stopped at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, help="folder of the results.json to add the counts to")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        corpus = make_corpus(folder / "text")
        times, runs = [], [folder / f"whole-{i}" for i in range(3)]
        for run in runs:
            begun = time.monotonic()
            if wait(start(corpus, run)):
                raise RuntimeError("a run that nobody stopped failed")
            times.append(time.monotonic() - begun)
        seconds, expected = min(times), content(runs[0])  # the shortest, so that few of the random moments come after the end
        report = {
            "differences_without_kills": [name for run in runs for name in differences(expected, content(run))], "seconds_of_a_run": round(seconds, 3),
        }  # fmt: skip
        if chosen.operations:
            report["operations"] = at_every_operation(corpus, folder, expected)
        if chosen.random:
            report["random"] = at_random(corpus, folder, expected, chosen.random, chosen.seed, seconds)
    print(json.dumps(report, indent=1))
    if chosen.out is not None:
        for name in report.keys() & KEPT.keys():
            keep(chosen.out, KEPT[name], report[name])
    parts = [part for part in report.values() if isinstance(part, dict)]
    return 1 if report["differences_without_kills"] or any(part["failures"] for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
