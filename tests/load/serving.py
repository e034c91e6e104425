"""What the server's cache, its turns and its drafts are worth, measured with one client and with many.

    python tests/load/serving.py RUN --out results/serving/http --transformers python

Adds three kinds of rows to results.json: the time to the first token of ten turns of a chat, with and without the prefix cache; tokens a second and the gap
between tokens for 1 … 64 streams; tokens a second of a text that repeats itself, with and without drafts. --transformers names a Python that has
transformers[serving]: the first two are then also measured of `transformers serve` with a Llama of the same size.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from driver import Address, ask, serving
from llama_server import make_llama, transformers_serving

TURNS = 10
NEW_TEXT = "the cat sat on a mat and the hat of the rat, and " * 8
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)


def stream(server: Address, path: str, body: dict[str, Any]) -> tuple[list[float], str, dict[str, Any]]:
    """Seconds from the request to each piece of text, the text, and the usage."""
    connection = http.client.HTTPConnection(*server, timeout=600)
    times: list[float] = []
    text, usage = "", {}
    started = time.perf_counter()
    connection.request("POST", path, json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(answer.read().decode())
    for line in answer:
        if line.startswith(b"data: {"):
            piece = json.loads(line[6:])
            usage = piece.get("usage") or usage
            for choice in piece["choices"]:
                if said := choice.get("text") or choice.get("delta", {}).get("content"):
                    times.append(time.perf_counter() - started)
                    text += said
    connection.close()
    return times, text, usage


@contextlib.contextmanager
def ours(run: Path, device: str, *flags: str) -> Iterator[tuple[Address, str]]:
    """`gam serve`: its address and the model's name."""
    with serving(run, "--device", device, *flags) as (server, _, _):
        yield server, ask(server, "/v1/models", None)[1]["data"][0]["id"]


def turns(started: contextlib.AbstractContextManager[tuple[Address, str]], variant: str, *, rounds: int) -> dict[str, Any]:
    """The time to the first token of each turn of a chat; the median of several chats that have nothing in common."""
    first: list[list[float]] = [[] for _ in range(TURNS)]
    state: dict[str, int] = {}
    with started as (server, model):
        stream(server, "/v1/completions", {"model": model, "prompt": NEW_TEXT, "max_tokens": 8})  # the first call pays for the library's own beginnings
        for number in range(rounds):
            messages, prompts, cached = [], [], []
            for turn in range(TURNS):
                messages.append({"role": "user", "content": f"{number} {NEW_TEXT}"})
                body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0.8, "seed": turn}
                times, text, usage = stream(server, "/v1/chat/completions", body)
                first[turn].append(times[0] if times else float("nan"))
                prompts.append(usage["prompt_tokens"])
                cached.append(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))
                state = {key: usage[key] for key in ("state_bytes",) if key in usage}
                messages.append({"role": "assistant", "content": text})
    medians = [round(statistics.median(each for each in times if each == each) * 1e3, 2) for times in first]
    return {
        "task": "serve-turns", "variant": variant, "first_token_ms_by_turn": medians, "prompt_tokens_by_turn": prompts, "cached_tokens_by_turn": cached, **state,
    }  # fmt: skip


def concurrency(started: contextlib.AbstractContextManager[tuple[Address, str]], variant: str, streams: int, *, tokens: int) -> dict[str, Any]:
    """Tokens a second of all streams together, and the gap between two tokens of one."""
    with started as (server, model):
        stream(server, "/v1/completions", {"model": model, "prompt": NEW_TEXT, "max_tokens": 8})
        found: list[tuple[list[float], str, dict[str, Any]]] = []
        each = max(16, tokens // streams)

        def work(i: int) -> None:
            body = {"model": model, "prompt": NEW_TEXT, "max_tokens": each, "seed": i}
            found.append(stream(server, "/v1/completions", body))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(streams)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
    if len(found) < streams:
        raise SystemExit(f"{streams - len(found)} of {streams} streams got no answer")
    gaps = [after - before for times, _, _ in found for before, after in zip(times, times[1:], strict=False)]
    drawn = sum(usage["completion_tokens"] for _, _, usage in found)
    return {
        "task": "serve-streams", "variant": variant, "batch_size": streams, "tokens_per_second": round(drawn / took, 1),
        "gap_ms_median": round(statistics.median(gaps) * 1e3, 2),
        "first_token_ms_median": round(statistics.median(times[0] for times, _, _ in found if times) * 1e3, 1),
    }  # fmt: skip


def drafts(run: Path, length: int, *, device: str, tokens: int) -> dict[str, Any]:
    """Tokens a second of the likeliest text, which in a small model soon repeats itself."""
    with serving(run, "--device", device, "--speculate", str(length)) as (server, _, _):
        model = ask(server, "/v1/models", None)[1]["data"][0]["id"]
        body = {"model": model, "prompt": NEW_TEXT, "max_tokens": tokens, "temperature": 0}
        stream(server, "/v1/completions", body | {"max_tokens": 8})
        times, _, usage = stream(server, "/v1/completions", body)
    rate = (usage["completion_tokens"] - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")
    return {"task": "serve-drafts", "variant": f"draft {length}", "tokens_per_second": round(rate, 1), "drawn_tokens": usage["completion_tokens"]}


def main() -> None:
    """All measurements, each written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory to serve")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results.json to add to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--transformers", default="", help="a Python with transformers[serving], to measure `transformers serve` as well")
    parser.add_argument("--rounds", type=int, default=5, help="chats")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a measurement, all streams together")
    chosen = parser.parse_args()
    from gam_lm.results import Results
    from gam_lm.runtime.measure import environment

    results = Results.open(chosen.out / "results.json", command=shlex.join(["python", *sys.argv]), environment=environment(), corpus=None)
    name = chosen.run.resolve().name

    def add(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        results.add({"model": name} | row)

    def missing(**row: Any) -> bool:
        return results.find({"model": name} | row) is None

    with tempfile.TemporaryDirectory() as folder:
        servers = {"cache": lambda *flags: ours(chosen.run, chosen.device, *flags), "no cache": lambda *flags: ours(chosen.run, chosen.device, "--cache-mb", "0", *flags)}
        if chosen.transformers:
            llama = Path(folder) / "llama"
            make_llama(chosen.run, llama)
            servers["transformers serve, Llama"] = lambda *flags: transformers_serving(llama, chosen.transformers, Path(folder) / "log")
        for variant, server in servers.items():
            if missing(task="serve-turns", variant=variant):
                add(turns(server(), variant, rounds=chosen.rounds))
        for variant, server in list(servers.items())[1:]:
            for streams in CONCURRENCY:
                if missing(task="serve-streams", variant=variant, batch_size=streams):
                    add(concurrency(server("--concurrent", str(streams)), variant, streams, tokens=chosen.tokens))
    for length in (0, 8):
        if missing(task="serve-drafts", variant=f"draft {length}"):
            add(drafts(chosen.run, length, device=chosen.device, tokens=min(chosen.tokens, 512)))


if __name__ == "__main__":
    main()
