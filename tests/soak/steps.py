"""Train a tiny model for 20,000 steps, with validations, states and metrics, and watch the memory and the open files of the process. Linux only.

    python tests/soak/steps.py --steps 20000 --out results/reliability

Prints the figures and adds them as a row to results.json; the exit code is 1 where memory grew by more than 2 % after the first fifth, or open files grew at all.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from kills import RECIPE, make_corpus

from gam_lm.config import ModelConfig
from gam_lm.training.loop import fit, new_model
from gam_lm.training.trackers import NoTracker

sys.path.insert(0, str(Path(__file__).parents[1] / "load"))
from driver import descriptors, memory_mb

MOST_GROWTH = 0.02
SAMPLES = 500


class Watch(NoTracker):
    """Notes memory and open files whenever figures come."""

    def __init__(self):
        self.memory, self.open = [], []

    def log(self, figures, step):
        self.memory.append(memory_mb(os.getpid()))
        self.open.append(descriptors(os.getpid()))


def soak(steps, folder):
    corpus = make_corpus(folder / "text")
    every = max(1, steps // SAMPLES)
    recipe = replace(RECIPE, steps=steps, validate_every=every, checkpoint_every=max(1, steps // 40))
    watch = Watch()
    model = new_model(ModelConfig(vocab_size=corpus.vocab_size, hidden_size=8, num_hidden_layers=1, dropout=0.1), 0)
    trained = fit(model, corpus, recipe, folder / "run", tracker=watch)
    assert trained.steps == steps
    fifth = max(1, len(watch.memory) // 5)
    before, after = statistics.median(watch.memory[fifth : 2 * fifth]), statistics.median(watch.memory[-fifth:])
    return {
        "steps": steps, "memory_mb_after_a_fifth": round(before, 2), "memory_mb_at_end": round(after, 2), "growth": round(after / before - 1, 5),
        "descriptors_after_a_fifth": max(watch.open[fifth : 2 * fifth]), "descriptors_at_end": max(watch.open[-fifth:]), "seconds": round(trained.seconds, 1),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="folder of the results.json to add a row to")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = soak(chosen.steps, Path(name))
    print(json.dumps(figures, indent=1))
    if chosen.out is not None:
        from gam_lm.results import Results
        from gam_lm.runtime.measure import environment

        results = Results.open(chosen.out / "results.json", command=shlex.join(["python", *sys.argv]), environment=environment(), corpus=None)
        results.add({"model": "gam", "task": "soak", "variant": f"{chosen.steps:,} steps"} | figures)
    return int(figures["growth"] > MOST_GROWTH or figures["descriptors_at_end"] > figures["descriptors_after_a_fifth"])


if __name__ == "__main__":
    sys.exit(main())
