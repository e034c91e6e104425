"""The OpenAI client against a real server on loopback."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gam_lm import LanguageModel, ModelConfig, generate_text, load_model, save_model
from gam_lm.cli.main import run
from gam_lm.errors import InputError
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.serve.limits import Limits
from gam_lm.serve.protocol import RequestError, read_request

pytest.importorskip("uvicorn", reason="pip install 'gam-lm[serve]'")
openai = pytest.importorskip("openai", reason="pip install 'gam-lm[dev]'")

from gam_lm.checkpoint import load_tokenizer_of
from gam_lm.serve.chat import Chat, read_chat_template
from gam_lm.serve.stopping import StopTexts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "cat"
    tokenizer = small_tokenizer()
    save_model(path, small_model(tokenizer.get_vocab_size()), tokenizer)
    return path


def small_model(vocab_size, **options):
    """The one place that knows how configurations are written."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "options": (GAMOptions(num_heads=2, num_memory_slots=8),)}
    return LanguageModel(ModelConfig(vocab_size=vocab_size, **size | options)).eval()


@cache
def small_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat of the rat"] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def address(folder):
    """The verb in a process of its own."""
    command = [sys.executable, "-m", "gam_lm", "serve", str(folder), "--port", "0", "--device", "cpu", "--most-tokens", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait(timeout=120)
        process.stdout.close()


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def active(address):
    with urllib.request.urlopen(address.replace("/v1", "/health")) as answer:
        return json.load(answer)["active"]


def wait_until_idle(address):
    deadline = time.monotonic() + 120
    while active(address) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert active(address) == 0


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["cat"] and client.models.retrieve("cat").owned_by == "gam-lm"
    with pytest.raises(openai.NotFoundError, match="this server has 'cat'"):
        client.models.retrieve("dog")


def test_a_completion_is_what_the_library_generates(client, folder):
    model, tokenizer = load_model(folder), load_tokenizer_of(folder)
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}):
        answer = client.completions.create(model="cat", prompt="the cat", max_tokens=12, **options)
        assert answer.choices[0].text == "".join(generate_text(model, tokenizer, "the cat", max_new_tokens=12, **options))
        assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
        counts = len(tokenizer.encode("the cat").ids), 12
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (*counts, sum(counts))


def test_a_stream_gives_the_same_text_piece_by_piece(client):
    options = {"model": "cat", "prompt": "the hat", "max_tokens": 20, "seed": 3}
    whole = client.completions.create(**options)
    pieces = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert len(pieces) > 3 and pieces[-1].usage == whole.usage and pieces[-1].choices == []
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert [piece.choices[0].finish_reason for piece in pieces[-3:-1]] == [None, "length"]
    assert len({piece.id for piece in pieces}) == 1


def test_stop_texts_end_the_answer_and_are_no_part_of_it(client):
    options = {"model": "cat", "prompt": "the", "max_tokens": 40, "seed": 1}
    text = client.completions.create(**options).choices[0].text
    stop = text[10:14]
    for stream in (False, True):
        answer = client.completions.create(**options, stop=[stop, "never to be seen"], stream=stream)
        choices = [piece.choices[0] for piece in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_several_prompts_choices_echo_and_token_ids(client, folder):
    ids = load_tokenizer_of(folder).encode("the mat").ids
    answer = client.completions.create(model="cat", prompt=["the mat", "the rat"], n=2, max_tokens=5, seed=0, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:7] for choice in answer.choices] == ["the mat"] * 2 + ["the rat"] * 2
    assert answer.choices[0].text != answer.choices[1].text and answer.usage.completion_tokens == 20
    assert client.completions.create(model="cat", prompt=ids, max_tokens=5, seed=0).choices[0].text == answer.choices[0].text[7:]


def test_a_chat_without_template_is_told_in_plain_lines(client, folder):
    messages = [{"role": "system", "content": "Be a cat."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    answer = client.chat.completions.create(model="cat", messages=messages, max_tokens=8, seed=2)
    prompt = "System: Be a cat.\nUser: Hello\nAssistant:"
    plain = client.completions.create(model="cat", prompt=prompt, max_tokens=8, seed=2, stop="\nUser:")
    assert answer.choices[0].message.content == plain.choices[0].text and answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion" and answer.usage == plain.usage
    pieces = list(client.chat.completions.create(model="cat", messages=messages, max_completion_tokens=8, seed=2, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == plain.choices[0].text
    assert [piece.choices[0].delta.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)


def test_several_requests_at_once_get_what_each_gets_alone(client):
    def ask(seed):
        return client.completions.create(model="cat", prompt="the", max_tokens=30, seed=seed).choices[0].text

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


def test_a_short_request_does_not_wait_for_a_long_one_and_cancelled_ones_free_their_state(client, address):
    wait_until_idle(address)
    stream = client.completions.create(model="cat", prompt="the", max_tokens=100_000, temperature=0, stream=True)
    next(iter(stream))
    assert active(address) == 1
    assert client.completions.create(model="cat", prompt="the", max_tokens=3).usage.completion_tokens <= 3
    assert active(address) == 1
    stream.close()
    wait_until_idle(address)

    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="cat", prompt="the", max_tokens=100_000, temperature=0, timeout=0.5)
    wait_until_idle(address)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 7000, "n": 16}, "max_tokens", "from 1 to 6250"),
        ({"max_tokens": 100_001}, "max_tokens", "from 1 to 100000"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"prompt": [99_999]}, "prompt", "id 99999"),
        ({"prompt": {"text": 1}}, "prompt", "a text"),
        ({"seed": "seven"}, "seed", "of type int"),
        ({"logprobs": 3}, "logprobs", "does not have it"),
        ({"extra_body": {"temprature": 1}}, "temprature", "no field"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_names_its_field(client, fields, param, said, stream):
    with pytest.raises(openai.BadRequestError, match=said) as error:
        client.completions.create(**{"model": "cat", "prompt": "the", "stream": stream, "max_tokens": 2} | fields)
    assert error.value.param == param and error.value.type == "invalid_request_error"


def test_another_model_no_json_and_no_route_are_told_in_json(client, address):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="dog", prompt="the")
    assert error.value.code == "model_not_found"
    for path, data, status in (("/completions", b"{", 400), ("/completions", None, 405), ("/embeddings", b"{}", 404)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(address + path, data, {"Content-Type": "application/json"}))
        with error.value:
            assert error.value.code == status and json.load(error.value)["error"]["message"]


def test_a_chat_needs_messages():
    for messages in (None, [], ["hello"], [{"role": "user"}]):
        with pytest.raises(RequestError, match="messages"):
            read_request(json.dumps({"model": "cat", "messages": messages}), model="cat", chat=True, limits=Limits())


def test_a_chat_template_is_rendered_and_its_refusal_is_a_bad_request(folder, tmp_path):
    source = "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (tmp_path / "chat_template.jinja").write_text(source)
    chat = Chat(load_tokenizer_of(folder), *read_chat_template(tmp_path))
    assert chat.text([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>" and chat.ends == ()
    assert chat.ids([{"role": "user", "content": "hi"}]) == load_tokenizer_of(folder).encode("<user>hi<assistant>").ids
    with pytest.raises(RequestError, match="no robots"):
        chat.ids([{"role": "robot", "content": "hi"}])
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match="is broken"):
        read_chat_template(tmp_path)


@given(st.lists(st.sampled_from(["<|endoftext|>", "cat", "\U000f0000", "\U000f0001", " ", "<|end"]), max_size=6).map("".join))
@settings(max_examples=40, deadline=None)
def test_what_a_user_writes_is_no_special_token(content):
    tokenizer = small_tokenizer()
    (end,) = tokenizer.encode("<|endoftext|>").ids
    ids = Chat(tokenizer, Template("{% for m in messages %}{{ m.content | trim }}<|endoftext|>{% endfor %}")).ids([{"role": "user", "content": content}])
    assert ids[-1] == end and end not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == content.strip()


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(st.text("abcd", max_size=5), max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_text_ends_before_the_first_stop_text_and_is_held_back_only_while_one_may_have_begun(stops, pieces):
    held, whole, said, stopped = StopTexts(stops), "", "", False
    for piece in pieces:
        whole += piece
        text, stopped = held.add(piece)
        said += text
        if stopped:
            break
        begun = max((n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
        assert said + held.rest == whole and len(held.rest) == begun
    ends = [place + len(stop) for stop in stops for place in range(len(whole)) if whole.startswith(stop, place)]
    assert stopped == bool(ends)
    if stopped:
        first = whole[: min(ends)]
        assert said in {first.removesuffix(stop) for stop in stops if first.endswith(stop)}


def test_stop_texts_are_found_in_linear_time():
    held, text = StopTexts(["a" * 200 + "b"]), "a" * 200_000
    started = time.perf_counter()
    for start in range(0, len(text), 100):
        held.add(text[start : start + 100])
    assert time.perf_counter() - started < 5 and held.rest == "a" * 200


@pytest.mark.parametrize(("host", "key", "said"), [("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("127.0.0.1", None, False), ("localhost", None, False)])
def test_a_server_that_others_reach_without_a_key_says_so(folder, host, key, said, monkeypatch, caplog):
    monkeypatch.delenv("GAM_API_KEY", raising=False)
    monkeypatch.setattr("gam_lm.serve.connections.make_server", lambda app, limits: SimpleNamespace(run=lambda sockets: [each.close() for each in sockets]))
    assert run(["serve", str(folder), "--host", host, "--port", "0", "--device", "cpu", *(["--api-key", key] if key else [])]) == 0
    assert any("host is 0.0.0.0 and there is no API key" in record.getMessage() for record in caplog.records) == said


def test_a_port_that_is_taken_is_named(folder, address, capsys):
    port = address.split(":")[2].split("/")[0]
    assert run(["serve", str(folder), "--port", port, "--device", "cpu"]) == 2
    assert "cannot listen" in capsys.readouterr().err
