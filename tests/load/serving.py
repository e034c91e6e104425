"""What the server's cache, its turns and its drafts are worth, measured with one client and with many.

    python tests/load/serving.py RUN --out results/serving

Adds three kinds of rows to results.json: the time to the first token of ten turns of a chat, with and without the prefix cache; tokens a second and the gap
between tokens for 1 … 64 streams; tokens a second of a text that repeats itself, with and without drafts.
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

TURNS = 10
NEW_TEXT = "the cat sat on a mat and the hat of the rat, and " * 8
CONCURRENCY = (1, 4, 16, 64)


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


def turns(run: Path, *, cache: bool, device: str, rounds: int) -> dict[str, Any]:
    """The time to the first token of each turn of a chat; the median of several chats that have nothing in common."""
    first: list[list[float]] = [[] for _ in range(TURNS)]
    with serving(run, "--device", device, *([] if cache else ["--cache-mb", "0"])) as (server, _, _):
        model = ask(server, "/v1/models", None)[1]["data"][0]["id"]
        stream(server, "/v1/completions", {"model": model, "prompt": NEW_TEXT, "max_tokens": 8})  # the first call pays for the library's own beginnings
        for number in range(rounds):
            messages, prompts, cached, state = [], [], [], 0
            for turn in range(TURNS):
                messages.append({"role": "user", "content": f"{number} {NEW_TEXT}"})
                body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0.8, "seed": turn}
                times, text, usage = stream(server, "/v1/chat/completions", body)
                first[turn].append(times[0] if times else float("nan"))
                prompts.append(usage["prompt_tokens"])
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
                state = usage["state_bytes"]
                messages.append({"role": "assistant", "content": text})
    medians = [round(statistics.median(each for each in times if each == each) * 1e3, 2) for times in first]
    return {
        "task": "serve-turns", "variant": "cache" if cache else "no cache", "first_token_ms_by_turn": medians, "prompt_tokens_by_turn": prompts,
        "cached_tokens_by_turn": cached, "state_bytes": state,
    }  # fmt: skip


def concurrency(run: Path, streams: int, *, device: str, tokens: int) -> dict[str, Any]:
    """Tokens a second of all streams together, and the gap between two tokens of one."""
    with serving(run, "--device", device, "--concurrent", str(streams), "--cache-mb", "0") as (server, _, _):
        model = ask(server, "/v1/models", None)[1]["data"][0]["id"]
        stream(server, "/v1/completions", {"model": model, "prompt": NEW_TEXT, "max_tokens": 8})
        found: list[tuple[list[float], str, dict[str, Any]]] = []
        each = max(16, tokens // streams)

        def work(i: int) -> None:
            body = {"model": model, "prompt": NEW_TEXT, "max_tokens": each, "seed": i}
            found.append(stream(server, "/v1/completions", body))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(streams)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - started
    gaps = [after - before for times, _, _ in found for before, after in zip(times, times[1:], strict=False)]
    drawn = sum(usage["completion_tokens"] for _, _, usage in found)
    return {
        "task": "serve-streams", "batch_size": streams, "tokens_per_second": round(drawn / took, 1), "gap_ms_median": round(statistics.median(gaps) * 1e3, 2),
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

    for cache in (True, False):
        add(turns(chosen.run, cache=cache, device=chosen.device, rounds=chosen.rounds))
    for streams in CONCURRENCY:
        add(concurrency(chosen.run, streams, device=chosen.device, tokens=chosen.tokens))
    for length in (0, 8):
        add(drafts(chosen.run, length, device=chosen.device, tokens=min(chosen.tokens, 512)))


if __name__ == "__main__":
    main()
