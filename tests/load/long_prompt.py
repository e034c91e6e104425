"""What others feel while the server reads a prompt of 100,000 tokens.

    python tests/load/long_prompt.py RUN --out results/reliability

One stream draws tokens throughout. First alone, then while the prompt is sent, tokenised and read, /health is asked over and over. Prints the figures and adds them
as a row to results.json; the exit code is 1 where /health ever took more than 100 ms, or where the stream's gaps are twice as long as without the prompt, in the median.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from driver import Address, ask, serving

WORDS = "the cat sat on a mat and the hat of the rat, where it said that a state is a state; "
MOST_HEALTH_MS = 100.0
MOST_GAP_RATIO = 2.0


class Stream(threading.Thread):
    """One stream after the other, and when each of their pieces came."""

    def __init__(self, server: Address, model: str) -> None:
        super().__init__()
        self.server, self.model, self.stopping = server, model, threading.Event()
        self.pieces: list[list[float]] = []

    def run(self) -> None:
        """Ask until told to stop."""
        seed = 0
        while not self.stopping.is_set():
            seed += 1
            connection = http.client.HTTPConnection(*self.server, timeout=600)
            body = {"model": self.model, "prompt": "the cat", "max_tokens": 4096, "seed": seed, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            times: list[float] = []
            self.pieces.append(times)
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
                if self.stopping.is_set():
                    break
            connection.close()

    def gaps_ms(self, start: float, end: float) -> list[float]:
        """Between neighbouring pieces of a stream that came from ``start`` to ``end``."""
        return [(b - a) * 1e3 for times in self.pieces for a, b in zip(times, times[1:], strict=False) if start <= a and b <= end]


def healths_ms(server: Address, until: Any) -> list[float]:
    """Times of /health, asked every 20 ms on one connection until ``until()``."""
    connection, found = http.client.HTTPConnection(*server, timeout=600), []
    while not until():
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        found.append((time.perf_counter() - started) * 1e3)
        time.sleep(0.02)
    connection.close()
    return found


def measure(run: Path, *, tokens: int, seconds: float, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """The figures of a run: the prompt's, and those of /health and of the stream without and with it."""
    with serving(run, *flags) as (server, _, log):
        model = ask(server, "/v1/models", None)[1]["data"][0]["id"]
        status, answer = ask(server, "/v1/completions", {"model": model, "prompt": WORDS * 20, "max_tokens": 1})
        assert status == 200, answer
        repeats = tokens * 20 // answer["usage"]["prompt_tokens"] + 1
        stream = Stream(server, model)
        stream.start()
        try:
            time.sleep(1.0)
            start = time.perf_counter()
            usual_health = healths_ms(server, lambda: time.perf_counter() - start > seconds)
            usual = stream.gaps_ms(start, time.perf_counter())
            found: list[Any] = []
            body = {"model": model, "prompt": WORDS * repeats, "max_tokens": 1}
            asker = threading.Thread(target=lambda: found.append(ask(server, "/v1/completions", body, timeout=600)))
            start = time.perf_counter()
            asker.start()
            health = healths_ms(server, lambda: not asker.is_alive())
            took = time.perf_counter() - start
            gaps = stream.gaps_ms(start, start + took)
        finally:
            stream.stopping.set()
            stream.join()
        ((status, answer),) = found
        assert status == 200, answer
        assert not any("Traceback" in line for line in log), log
    return {
        "task": "serve-long-prompt", "prompt_tokens": answer["usage"]["prompt_tokens"], "seconds": round(took, 1),
        "health_ms_median": round(statistics.median(health), 2), "health_ms_max": round(max(health), 1), "usual_health_ms_max": round(max(usual_health), 1),
        "gap_ms_median": round(statistics.median(gaps), 2), "gap_ms_p99": round(quantile(gaps, 0.99), 2), "gap_ms_max": round(max(gaps), 1),
        "usual_gap_ms_median": round(statistics.median(usual), 2), "usual_gap_ms_p99": round(quantile(usual, 0.99), 2), "requests": 1 + len(health),
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    """The value that this share of the others does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    """The measurement from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory to serve")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the prompt, at least")
    parser.add_argument("--seconds", type=float, default=10, help="of the measurement without the prompt")
    parser.add_argument("--out", type=Path, help="folder of the results.json to add to")
    chosen = parser.parse_args()
    figures = measure(chosen.run, tokens=chosen.tokens, seconds=chosen.seconds)
    print(json.dumps(figures, indent=1))
    if chosen.out is not None:
        from gam_lm.results import Results
        from gam_lm.runtime.measure import environment

        results = Results.open(chosen.out / "results.json", command=shlex.join(["python", *sys.argv]), environment=environment(), corpus=None)
        results.add({"model": chosen.run.resolve().name} | figures)
    return int(figures["health_ms_max"] > MOST_HEALTH_MS or figures["gap_ms_median"] > MOST_GAP_RATIO * figures["usual_gap_ms_median"])


if __name__ == "__main__":
    sys.exit(main())
