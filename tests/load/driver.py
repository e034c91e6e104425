"""64 clients at once, good, slow, dropping and malformed ones, against a server that this starts.

    python tests/load/driver.py RUN --seconds 60 --out results/reliability

Prints the figures and adds them as a row to results.json. A run fails where an answer has status 500, a good answer differs from the one given alone, or the
server's memory grows without end.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Address = tuple[str, int]

KINDS = ("whole", "whole", "whole", "stream", "stream", "chat", "slow", "dropping", "malformed")
"""What a client does next, drawn evenly."""

MALFORMED = (
    b"", b"{", b"[]", b"\xff\xfe", b'{"model": 1}', b'{"model": "%s", "prompt": "\\ud800"}', b'{"model": "%s", "prompt": [1e400]}',
    b'{"model": "%s", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"model": "%s", "prompt": [-1], "echo": true}',
    b'{"model": "%s", "prompt": "a", "temperature": 1e400}', b'{"model": "%s", "prompt": "a", "n": 1000000}', b'{"model": "dog", "prompt": "a"}',
)  # fmt: skip


@dataclass
class Tally:
    """What happened, counted by all clients together."""

    statuses: Counter[str] = field(default_factory=Counter)
    """By kind and status, as "whole 200"."""
    differing: list[str] = field(default_factory=list)
    """Good answers that were not those given alone."""
    failed: list[str] = field(default_factory=list)
    """Good requests that got no answer."""
    first_seconds: list[float] = field(default_factory=list)
    """Times from a streaming request to its first text."""
    tokens: int = 0
    """Drawn for good requests."""

    @property
    def requests(self) -> int:
        """All of them."""
        return sum(self.statuses.values())

    @property
    def errors_500(self) -> int:
        """Answers with a status of 500 or above."""
        return sum(number for name, number in self.statuses.items() if name.split()[1] >= "500")


@contextlib.contextmanager
def serving(run: Path, *flags: str) -> Iterator[tuple[Address, int, list[str]]]:
    """A server in a process of its own: its address, process id and log."""
    command = [sys.executable, "-m", "gam_lm", "serve", str(run), "--port", "0", "--header-seconds", "2", "--body-seconds", "2", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    errors = process.stderr
    reader = threading.Thread(target=lambda: log.extend(errors))
    reader.start()
    try:
        found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start:\n" + "".join(log))
        yield (found[1], int(found[2])), process.pid, log
    finally:
        process.terminate()
        process.wait(30)
        reader.join()
        process.stdout.close()
        process.stderr.close()


def ask(server: Address, path: str, body: dict[str, Any] | bytes | None, timeout: float = 120) -> tuple[int, Any]:
    """Status and parsed JSON of an answer."""
    connection = http.client.HTTPConnection(*server, timeout=timeout)
    try:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def requests_for(model: str, number: int = 40) -> list[dict[str, Any]]:
    """Requests whose answers depend on nothing but themselves."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "hat", "of", "the", "rat", ""]
    made = []
    for i in range(number):
        prompt = " ".join(draw.choice(words) for _ in range(draw.choice((1, 5, 40, 300))))
        made.append({"model": model, "prompt": prompt, "max_tokens": draw.choice((1, 8, 24)), "seed": i, "temperature": draw.choice((0, 0.8)), "stop": ["zq", "the the the"]})
    return made


def streamed(server: Address, body: dict[str, Any], started: float) -> tuple[int, str, float]:
    """Status, text and seconds to the first text of a stream."""
    connection = http.client.HTTPConnection(*server, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
        answer, text, first = connection.getresponse(), "", 0.0
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                text += json.loads(line[6:])["choices"][0]["text"]
        return answer.status, text, first
    finally:
        connection.close()


class Client:
    """One client, which asks until it is told to stop."""

    def __init__(self, server: Address, model: str, good: list[tuple[dict[str, Any], str, int]], tally: Tally, seed: int, until: float, most: int) -> None:
        self.server, self.model, self.good, self.tally, self.until, self.most = server, model, good, tally, until, most
        self.draw = random.Random(seed)

    def work(self) -> None:
        """Ask, in a thread."""
        while time.monotonic() < self.until and self.tally.requests < self.most:
            kind = self.draw.choice(KINDS)
            try:
                status = getattr(self, kind)()
            except (OSError, http.client.HTTPException, ValueError) as error:
                status = 0
                if kind in ("whole", "stream", "chat"):
                    self.tally.failed.append(f"{kind}: {error!r}")
            self.tally.statuses[f"{kind} {status:03}"] += 1

    def whole(self) -> int:
        """A good request, answered at once."""
        body, text, tokens = self.draw.choice(self.good)
        status, answer = ask(self.server, "/v1/completions", body)
        self._compare(body, status, status == 200 and answer["choices"][0]["text"], text, tokens)
        return status

    def stream(self) -> int:
        """A good request, answered piece by piece."""
        body, text, tokens = self.draw.choice(self.good)
        status, found, first = streamed(self.server, body, time.perf_counter())
        self._compare(body, status, found, text, tokens)
        self.tally.first_seconds.append(first)
        return status

    def chat(self) -> int:
        """A chat of some turns; only its form is checked."""
        messages = [{"role": "user", "content": "the cat sat " * self.draw.randrange(1, 60)}]
        for _ in range(2):
            status, answer = ask(self.server, "/v1/chat/completions", {"model": self.model, "messages": messages, "max_tokens": 8})
            if status != 200:
                return status
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "and the hat"}]
        return status

    def slow(self) -> int:
        """A body that comes in drops, sometimes too slowly; a stream that is read in drops."""
        body = json.dumps(self.draw.choice(self.good)[0] | {"stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(self.server, timeout=60) as connection:
            pause = self.draw.choice((0.0, 0.02, 1.0))
            for start in range(0, len(head + body), 40):
                connection.sendall((head + body)[start : start + 40])
                time.sleep(pause)
                if time.monotonic() > self.until:
                    return 0
            found = b""
            while more := connection.recv(200):
                found += more
                time.sleep(0.001)
            return int(found[9:12])

    def dropping(self) -> int:
        """A client that goes away: at once, in the middle of its body, or in the middle of the answer."""
        body = json.dumps({"model": self.model, "prompt": "the cat " * self.draw.choice((1, 2000)), "max_tokens": 200, "stream": self.draw.random() < 0.5}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(self.server, timeout=60) as connection:
            connection.sendall((head + body)[: self.draw.choice((0, 50, 200, None))])
            time.sleep(self.draw.random() * 0.2)
        return 0

    def malformed(self) -> int:
        """A body that is no request."""
        body = self.draw.choice(MALFORMED).replace(b"%s", self.model.encode())
        status, answer = ask(self.server, "/v1/completions", body)
        if not 400 <= status < 500 or not answer["error"]["message"]:
            self.tally.differing.append(f"malformed {body[:60]!r}: {status}")
        return status

    def _compare(self, body: dict[str, Any], status: int, found: Any, text: str, tokens: int) -> None:
        if status != 200:
            self.tally.failed.append(f"status {status}")
        elif found != text:
            self.tally.differing.append(f"{body}: {found!r} is not {text!r}")
        self.tally.tokens += tokens


def memory_mb(pid: int) -> float:
    """Resident memory of a process, on Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors(pid: int) -> int:
    """Open files of a process, on Linux."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def load(run: Path, *, clients: int, seconds: float, most: int = 2**31, flags: tuple[str, ...] = ()) -> tuple[dict[str, Any], Tally, list[str]]:
    """Run the load and return its figures, the tally and the server's log."""
    with serving(run, *flags) as (server, pid, log):
        model = ask(server, "/v1/models", None)[1]["data"][0]["id"]
        good = []
        for body in requests_for(model):
            status, answer = ask(server, "/v1/completions", body)
            assert status == 200, answer
            good.append((body, answer["choices"][0]["text"], answer["usage"]["completion_tokens"]))
        tally, samples = Tally(), []
        started = time.monotonic()
        threads = [threading.Thread(target=Client(server, model, good, tally, i, started + seconds, most).work) for i in range(clients)]
        for thread in threads:
            thread.start()
        waits = []
        while any(thread.is_alive() for thread in threads):
            begun = time.perf_counter()
            ask(server, "/health", None)
            waits.append(time.perf_counter() - begun)
            samples.append((tally.requests, memory_mb(pid)))
            time.sleep(0.1)
        took = time.monotonic() - started
        deadline = time.monotonic() + 30
        while (health := ask(server, "/health", None)[1])["active"] or health["answering"] or health["waiting"]:
            assert time.monotonic() < deadline, f"the server did not come to rest: {health}"
            time.sleep(0.05)
        # The first half fills the cache and the allocator's pools.
        half = [memory for done, memory in samples if done >= tally.requests / 2]
        figures = {
            "clients": clients, "seconds": round(took, 1), "requests": tally.requests, "requests_per_second": round(tally.requests / took, 1),
            "good_tokens_per_second": round(tally.tokens / took, 1), "errors_500": tally.errors_500, "failed": len(tally.failed), "differing": len(tally.differing),
            "health_ms_median": round(statistics.median(waits) * 1e3, 1), "health_ms_max": round(max(waits) * 1e3, 1),
            "memory_mb_at_half": round(statistics.median(half[: max(1, len(half) // 5)]), 1), "memory_mb_at_end": round(statistics.median(half[-max(1, len(half) // 5) :]), 1),
            "descriptors_at_end": descriptors(pid), "statuses": dict(sorted(tally.statuses.items())),
        }  # fmt: skip
        if tally.first_seconds:
            figures["first_token_ms_median"] = round(statistics.median(tally.first_seconds) * 1e3, 1)
    return figures, tally, log


def main() -> int:
    """The load from the command line; the exit code is 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory to serve")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=2**31, help="stop after so many requests")
    parser.add_argument("--cache-mb", type=int, default=32, help="of the server's prefix cache: so small that it is full long before half time")
    parser.add_argument("--out", type=Path, help="folder of the results.json to add to")
    chosen = parser.parse_args()
    figures, tally, log = load(chosen.run, clients=chosen.clients, seconds=chosen.seconds, most=chosen.requests, flags=("--cache-mb", str(chosen.cache_mb)))
    print(json.dumps(figures, indent=1))
    for line in [*tally.differing[:5], *tally.failed[:5]]:
        print(line)
    if chosen.out is not None:
        from gam_lm.results import Results
        from gam_lm.runtime.measure import environment

        results = Results.open(chosen.out / "results.json", command=shlex.join(["python", *sys.argv]), environment=environment(), corpus=None)
        results.add({"model": chosen.run.resolve().name, "task": "serve-load", "variant": f"{chosen.clients} clients"} | figures)
    grown = figures["memory_mb_at_end"] > 1.05 * figures["memory_mb_at_half"] + 8
    broken = any("Traceback" in line for line in log)
    return int(bool(figures["errors_500"] or figures["failed"] or figures["differing"] or grown or broken))


if __name__ == "__main__":
    sys.exit(main())
