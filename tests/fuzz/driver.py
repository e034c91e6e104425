"""Fuzz every kind of input for as long as one likes, and count what is lost.

    python tests/fuzz/driver.py --inputs 100000 --seed 1        so many in all, shared out by kind
    python tests/fuzz/driver.py --inputs 500 --kind flags       of one kind
    python tests/fuzz/driver.py --out results/reliability       and add the counts to those that are there

The answer is one JSON object; the exit code is 1 where an input was lost: a traceback, an answer that is wrong, or more than one line.
"""

import argparse
import json
import logging
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from inputs import KINDS

SHARES = {"configurations": 30, "recipes": 20, "safetensors files": 25, "HTTP bodies": 10, "results and block files": 8, "flags": 3, "run directories": 3, "resumed runs": 1,
          "data files": 6, "tokenizer files": 2, "folders of texts": 4}  # fmt: skip
SHOWN = 20
PART = 500


def fuzz(kind, count, seed):
    """Try ``count`` inputs of a kind."""
    tally = {"tried": 0, "used": 0, "refused": 0, "lost": 0, "examples": []}

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(made=kind.inputs)
    def attack(made):
        tally["tried"] += 1
        try:
            tally["used" if kind.check(made) else "refused"] += 1
        except Exception:
            tally["lost"] += 1
            if len(tally["examples"]) < SHOWN:
                tally["examples"].append({"input": repr(made)[:600], "error": traceback.format_exc().splitlines()[-1][:300], "where": traceback.format_exc().splitlines()[-4:-1]})

    begun = time.monotonic()
    attack()
    return {**tally, "seconds": round(time.monotonic() - begun, 1)}


def keep(out, name, tally):
    """Add what was found to the row of the kind."""
    from gam_lm.results import Results
    from gam_lm.runtime.measure import environment

    results = Results.open(out / "results.json", command=shlex.join(["python", *sys.argv]), environment=environment(), corpus=None)
    row = {"model": "gam", "task": "fuzz", "variant": name}
    before = results.find(row) or {}
    results.add(row | {key: round(before.get(key, 0) + tally[key], 1) for key in ("tried", "used", "refused", "lost", "seconds")})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), help="one kind alone")
    parser.add_argument("--out", type=Path, help="folder of the results.json to add a row for each kind to")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    shares = {chosen.kind: 1} if chosen.kind else SHARES
    report = {}
    for name, share in shares.items():
        left, batch = max(1, round(chosen.inputs * share / sum(shares.values()))), 0
        while left > 0:  # in parts, each of which is kept when it is done
            found = fuzz(KINDS[name], min(left, PART), chosen.seed * 100_003 + batch)
            left, batch = left - PART, batch + 1
            before = report.get(name, {key: [] if key == "examples" else 0 for key in found})
            report[name] = {key: before[key] + found[key] for key in found}
            if chosen.out is not None:
                keep(chosen.out, name, found)
        print(f"{name}: {report[name]['tried']} tried, {report[name]['lost']} lost", file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))
    return 1 if any(each["lost"] for each in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
