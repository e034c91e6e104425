"""A server that strangers may reach: limits, keys, hosts, broken requests, and long prompts that hold up nobody."""

import contextlib
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_serve import small_model, small_tokenizer

from gam_lm import save_model
from gam_lm.serve.limits import Limits
from gam_lm.serve.protocol import RequestError, read_request

pytest.importorskip("uvicorn", reason="pip install 'gam-lm[serve]'")

BODY = {"model": "cat", "prompt": "the", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "cat"
    save_model(path, small_model(small_tokenizer().get_vocab_size(), num_hidden_layers=4), small_tokenizer())
    return path


@contextlib.contextmanager
def serving(folder, *flags, **environment):
    """Host and port of the verb in a process of its own, and its log at the end."""
    command = [sys.executable, "-m", "gam_lm", "serve", str(folder), "--port", "0", "--device", "cpu", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    log = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr))
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, log
        yield ("127.0.0.1", int(re.search(r":(\d+)/", line)[1])), log
    finally:
        process.terminate()
        process.wait(timeout=120)
        reader.join()
        process.stdout.close()
        process.stderr.close()
    assert not any("Traceback" in line for line in log), "".join(log)


@pytest.fixture(scope="module")
def server(folder):
    """With limits that a test can reach."""
    flags = ("--most-body-bytes", "2000000", "--header-seconds", "1", "--body-seconds", "1", "--write-seconds", "2", "--most-tokens", "1000000", "--allow-host", "cat.example")
    with serving(folder, *flags) as (address, log):
        yield address
    assert len(log) < 60  # no flood


def ask(server, body=BODY, path="/v1/completions", method="POST", **headers):
    """Status, headers and parsed JSON of an answer."""
    connection = http.client.HTTPConnection(*server, timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(content) if "json" in answer.headers.get("Content-Type", "") else content.decode()


def health(server):
    return ask(server, None, "/health", "GET")[2]


def until_idle(server, seconds=120):
    deadline = time.monotonic() + seconds
    while (now := health(server)) != {"status": "ok", "active": 0, "answering": 0, "waiting": 0}:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


BROKEN = {
    "lone surrogate": (b'{"model": "cat", "prompt": "\\ud800"}', 400),
    "invalid UTF-8": (b'{"model": "cat", "prompt": "\xff"}', 400),
    "id of 2^70": (b'{"model": "cat", "prompt": [%d]}' % 2**70, 400),
    "id of -1 with echo": (b'{"model": "cat", "prompt": [-1], "echo": true}', 400),
    "id outside the vocabulary with echo": (b'{"model": "cat", "prompt": [5000], "echo": true}', 400),
    "temperature 1e400": (b'{"model": "cat", "prompt": "a", "temperature": 1e400}', 400),
    "temperature NaN": (b'{"model": "cat", "prompt": "a", "temperature": NaN}', 400),
    "deep nesting": (b'{"model": "cat", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "deep nesting where anything goes": (b'{"model": "cat", "prompt": "a", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", 400),
    "seed of 2^70": (b'{"model": "cat", "prompt": "a", "seed": %d}' % 2**70, 400),
    "true for a number": (b'{"model": "cat", "prompt": "a", "max_tokens": true}', 400),
    "empty body": (b"", 400),
    "a list": (b"[1]", 400),
    "no model": (b'{"prompt": "a"}', 400),
    "a long model": (b'{"model": "%s", "prompt": "a"}' % (b"a" * 100_000), 404),
    "a long field": (b'{"model": "cat", "prompt": "a", "%s": 1}' % (b"a" * 100_000), 400),
    "a million wrong ids": (b'{"model": "cat", "prompt": [' + b",".join([b"-1"] * 600_000) + b"]}", 400),
    "five stop texts": (b'{"model": "cat", "prompt": "a", "stop": ["a", "b", "c", "d", "e"]}', 400),
    "a long stop text": (b'{"model": "cat", "prompt": "a", "stop": "%s"}' % (b"a" * 257), 400),
    "an empty stop text": (b'{"model": "cat", "prompt": "a", "stop": ""}', 400),
    "too many prompt tokens": (b'{"model": "cat", "prompt": [' + b",".join([b"1"] * 140_000) + b"]}", 400),
    "too many prompts": (b'{"model": "cat", "prompt": [' + b",".join([b'"a"'] * 17) + b"]}", 400),
    "body too large": (b" " * 2_000_001, 413),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_request_is_refused_in_json(server, name):
    body, expected = BROKEN[name]
    status, _, answer = ask(server, body)
    assert status == expected and set(answer["error"]) == {"message", "type", "param", "code"}
    assert 0 < len(answer["error"]["message"]) < 400 and "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("how", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 5e-324}, {"top_k": 2**40}, {"seed": -(2**63)}, {"seed": 2**63 - 1, "n": 2}])
def test_extreme_numbers_that_are_allowed_are_answered(server, how):
    assert ask(server, BODY | {"temperature": 1.0} | how)[0] == 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5) | st.sampled_from([2**70, -1, "cat", "the"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from([
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options", "echo",
    "logprobs", "logit_bias", "user", "tools", "role", "x",
])  # fmt: skip


@given(st.dictionaries(FIELDS, ANYTHING, max_size=4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_request_or_an_error_of_one_line(fields, chat):
    start = {"model": "cat"} | ({"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "the"})
    body = json.dumps(start | fields)
    try:
        request = read_request(body, model="cat", chat=chat, limits=Limits())
    except RequestError as error:
        assert error.status in (400, 404) and "\n" not in str(error) and len(json.dumps(error.body())) < 2000
    else:
        assert 1 <= request.max_tokens * request.n * max(1, len(request.prompts)) <= Limits().most_tokens and 0 <= request.temperature <= 2


@given(st.dictionaries(FIELDS, ANYTHING, max_size=3), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_brings_status_500(server, fields, chat):
    start = {"model": "cat", "max_tokens": 2} | ({"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "the"})
    status, _, answer = ask(server, start | fields, "/v1/chat/completions" if chat else "/v1/completions")
    assert status in (200, 400, 404) and (status == 200 or answer["error"]["message"])


def test_content_type_and_host_are_checked(server):
    assert ask(server, Content_Type="text/plain")[0] == 415
    assert ask(server, Content_Type="application/json; charset=utf-8")[0] == 200
    for host, status in (("evil.example", 421), ("cat.example", 200), ("localhost:1", 200), ("[::1]:80", 200), ("192.168.0.7", 200), ("", 421), ("127.0.0.1.evil", 421)):
        assert ask(server, Host=host)[0] == status, host


def test_unknown_routes_and_methods_are_json(server):
    for path, method, status in (("/v2", "GET", 404), ("/v1/completions", "GET", 405), ("/v1/models/dog", "GET", 404), ("/%ff%00", "GET", 404)):
        found, _, answer = ask(server, None, path, method)
        assert found == status and answer["error"]["message"]


def test_no_other_origin_may_ask_unless_it_is_named(server, folder):
    assert "Access-Control-Allow-Origin" not in ask(server, Origin="https://a.example")[1]
    with serving(folder, "--cors", "https://a.example") as (other, _):
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            assert ask(other, Origin=origin)[1].get("Access-Control-Allow-Origin") == allowed
            preflight = {"Origin": origin, "Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
            assert ask(other, None, method="OPTIONS", **preflight)[1].get("Access-Control-Allow-Origin") == allowed


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_key_is_needed_where_one_is_set(folder, by):
    with serving(folder, *(["--api-key", "sesam"] if by == "flag" else []), **({"GAM_API_KEY": "sesam"} if by == "environment" else {})) as (server, log):
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesam"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer s\u00e9sam"}):
            status, _, answer = ask(server, **header)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert ask(server, None, "/metrics", "GET", **header)[0] == 401 and ask(server, None, "/v1/models", "GET", **header)[0] == 401
        assert ask(server, Authorization="Bearer sesam")[0] == 200
        assert ask(server, None, "/health", "GET")[0] == 200 and ask(server, None, "/", "GET")[0] == 200
        assert not any("sesam" in line for line in log)


def raw(server, *parts, wait=0.0):
    """What a client gets that sends these bytes."""
    with socket.create_connection(server, timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(wait)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                found += more
        return found


def test_slow_headers_and_bodies_are_ended(server):
    started = time.monotonic()
    assert raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n").startswith(b"HTTP/1.1 408 ")
    assert raw(server, b"").startswith(b"HTTP/1.1 408 ")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    assert raw(server, head, b'{"model"').startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 60
    # A connection that is used again has the limit anew.
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for parts in ((get, get[:20]), (get + get[:20],)):
        found = raw(server, *parts)
        assert found.count(b"HTTP/1.1 200") == 1 and found.count(b"HTTP/1.1 408") == 1
    until_idle(server)


def test_what_is_no_http_is_answered_in_json_without_a_flood_of_lines(server):
    for junk in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"A" * 100_000):
        for _ in range(20):
            found = raw(server, junk)
            assert found == b"" or (found.startswith(b"HTTP/1.1 400 ") and json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"])
    assert ask(server)[0] == 200


def test_a_client_that_takes_nothing_is_left(server):
    body = json.dumps({"model": "cat", "prompt": "the", "max_tokens": 1_000_000, "temperature": 1, "stream": True, "echo": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server)
    connection.sendall(head + body)
    try:
        until_idle(server, 60)
    finally:
        connection.close()


def test_beyond_a_bounded_queue_there_is_429_with_a_time_to_come_back(folder):
    with serving(folder, "--concurrent", "1", "--waiting", "2", "--most-tokens", "100000") as (server, _):
        streams = [urllib.request.urlopen(request(server, {"max_tokens": 100_000, "stream": True})) for _ in range(3)]
        while health(server)["answering"] + health(server)["waiting"] < 3:
            time.sleep(0.01)
        status, headers, answer = ask(server)
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60 and answer["error"]["code"] == "rate_limit_exceeded"
        for stream in streams:
            stream.close()
        until_idle(server)
        assert ask(server)[0] == 200


def request(server, options, chat=False):
    body = json.dumps({**BODY, **options}).encode()
    return urllib.request.Request(f"http://{server[0]}:{server[1]}/v1/completions", body, {"Content-Type": "application/json"})


class Stream:
    """Takes a stream in a thread and notes when each token came."""

    def __init__(self, server, **options):
        self.times, self._answer = [], urllib.request.urlopen(request(server, {"max_tokens": 1_000_000, "stream": True} | options))
        self.thread = threading.Thread(target=self._take)
        self.thread.start()

    def _take(self):
        with contextlib.suppress(ValueError, OSError, http.client.HTTPException):
            for line in self._answer:
                if line.startswith(b"data: {"):
                    self.times.append(time.perf_counter())

    def gaps(self, start, end):
        times = [each for each in self.times if start <= each <= end]
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    def close(self):
        self._answer.fp.raw._sock.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self._answer.close()


@pytest.mark.slow
def test_a_prompt_of_100_000_tokens_holds_up_nobody(server):
    text = "the cat sat on a mat " * 15_000
    assert 100_000 < len(small_tokenizer().encode(text).ids) < 131_072
    until_idle(server)
    stream = Stream(server)
    time.sleep(2)
    body = json.dumps({"model": "cat", "prompt": text, "max_tokens": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    waits, beside = [], 0
    with socket.create_connection(server) as connection:
        begun = time.perf_counter()
        connection.sendall(head + body)
        while time.perf_counter() < begun + 4:
            started = time.perf_counter()
            active = health(server)["active"]
            end = time.perf_counter()
            waits.append(end - started)
            beside += active == 2
            if beside and active < 2:  # a quick machine: it was read
                break
            time.sleep(0.02)
        assert beside > 10
    while health(server)["active"] == 2:
        time.sleep(0.01)
    rest = time.perf_counter()
    time.sleep(2)
    busy, usual = stream.gaps(begun, end), stream.gaps(begun - 1.5, begun) + stream.gaps(rest, rest + 2)
    stream.close()
    figures = f"gap {statistics.median(usual) * 1e3:.2f} ms, beside the prompt {statistics.median(busy) * 1e3:.2f} ms; /health at most {max(waits) * 1e3:.1f} ms"
    # Where tests share two cores a gap is several times as long now and then. That a token waits for one block at most has a test without a clock.
    assert statistics.median(busy) < 4 * statistics.median(usual), figures
    assert sorted(waits)[int(len(waits) * 0.95)] < 0.3, figures  # results/reliability has the figure of a quiet machine
    until_idle(server)


def test_a_client_that_leaves_ends_its_work_within_a_piece(server):
    until_idle(server)
    for stream in (False, True):
        body = json.dumps({"model": "cat", "prompt": [5] * 120_000, "max_tokens": 5, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(server) as connection:
            connection.sendall(head + body)
            while health(server)["active"] == 0:
                time.sleep(0.005)
        until_idle(server, 1.5)
