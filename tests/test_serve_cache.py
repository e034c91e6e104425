"""The prefix cache, shared prompts and drafts change how much is computed, never what is answered."""

import asyncio
import json
import re
import time
from contextlib import aclosing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serve import small_model, small_tokenizer
from test_serve_hostile import BODY, ask, folder, serving  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gam_lm.inference.context import state_tensors
from gam_lm.inference.generation import generate
from gam_lm.serve.engine import Engine
from gam_lm.serve.limits import Limits
from gam_lm.serve.model_thread import ModelThread
from gam_lm.serve.prefix_cache import PrefixCache
from gam_lm.serve.protocol import read_request

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(st.booleans(), TEXTS), max_size=40), st.integers(60, 800))
@settings(max_examples=150, deadline=None)
def test_the_cache_finds_the_longest_start_that_it_holds(steps, capacity):
    """Against a plain dictionary in the order of use."""
    cache, held = PrefixCache(capacity, lambda state: 50), {}
    for keep, text in steps:
        if keep:
            cache.keep(text, tuple(text))
            if tuple(text) in {node.state for node in cache._used}:
                held.pop(tuple(text), None)
                held[tuple(text)] = None
            there = {node.state for node in cache._used}
            assert list(held)[len(held) - len(there) :] == [node.state for node in cache._used]  # the oldest went first
            held = {key: None for key in held if key in there}
        else:
            found = cache.find(text)
            starts = [key for key in held if list(key) == text[: len(key)]]
            best = max(starts, key=len, default=None)
            assert (found.state, found.tokens) == (best, len(best or ()))
            assert found.shared >= found.tokens
            if best is not None:
                held.pop(best)
                held[best] = None
        assert cache.nbytes == sum(50 for _ in cache._used) + edges(cache._root) <= capacity
        assert len(cache) == len(held)


def edges(node):
    """Bytes of ids in the tree; no node leads nowhere or could be part of its child's edge."""
    for child in node.children.values():
        assert child.parent is node and (child.state is not None or len(child.children) > 1)
    return sum(len(child.edge) + edges(child) for child in node.children.values())


def test_where_texts_branch_is_known():
    cache = PrefixCache(10_000, lambda state: 1)
    cache.keep([1, 2, 3, 4, 5], "a")
    assert cache.find([1, 2, 3, 9]).shared == 3 and cache.find([1, 2, 3, 9]).tokens == 0
    assert cache.find([1, 2, 3, 4, 5, 6]) == (5, "a", 5)
    cache.keep([0] * 10_000, "too large")
    assert len(cache) == 1


def engine(kind, **options):
    of_kind = {} if kind == "written" else {"mixers": (kind,), "options": ()}
    model = small_model(small_tokenizer().get_vocab_size(), **{"num_hidden_layers": 2} | of_kind)
    return Engine(model=model, tokenizer=small_tokenizer(), piece=8, **options)


def request(**options):
    return read_request(json.dumps({"model": "cat", "prompt": "a", "max_tokens": 30, "seed": 3} | options), model="cat", chat=False, limits=Limits())


async def written(engine, ids, **options):
    """Text, tokens and cached tokens of one answer."""
    prompt = await engine.read(list(ids))
    text, tokens = "", 0
    async with aclosing(engine.write(prompt, request(**options), (), 0)) as pieces:
        async for piece in pieces:
            text, tokens = text + piece.text, piece.tokens
    return text, tokens, prompt.cached


KINDS = ("written", "attention", "mamba")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_start_changes_no_bit(kind):
    async def work():
        cold, warm = engine(kind), engine(kind, cache_bytes=2**22, cache_every=8)
        for ids in ([5] * 30, [5] * 30 + [7] * 20, [5] * 12 + [9] * 30, [5] * 30):
            plain, cached = await cold.read(ids), await warm.read(ids)
            assert torch.equal(plain.logits_V, cached.logits_V)
            assert all(map(torch.equal, state_tensors(plain.state), state_tensors(cached.state)))
            yield cached.cached

    async def collected():
        return [each async for each in work()]

    assert asyncio.run(collected()) == [0, 24, 8, 24]


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_of_a_chat_pays_for_its_new_tokens_alone(kind):
    async def work():
        cold, warm = engine(kind), engine(kind, cache_bytes=2**22)
        ids = list(range(30, 51))  # after which no model ends its answer early
        for turn in range(4):
            cold_prompt, warm_prompt = await cold.read(ids), await warm.read(ids)
            torch.testing.assert_close(warm_prompt.logits_V, cold_prompt.logits_V, rtol=0, atol=1e-4)
            if turn:
                assert warm_prompt.cached == len(ids) - 4  # the last token of the answer was drawn, not read
            answer = [piece async for piece in warm.write(warm_prompt, request(max_tokens=9, temperature=0), (), 0)]
            assert answer[-1].tokens == 9
            reads = max((node for node in warm.cache._used), key=lambda node: int(node.state.position_B[0]))
            ids = ids + list(torch.frombuffer(bytearray(path(reads)), dtype=torch.int32).tolist())[len(ids) :] + [11, 12, 13, 14]
        return warm_prompt.cached

    assert asyncio.run(work()) > 40


def path(node):
    return path(node.parent) + node.edge if node.parent is not None else b""


def test_states_are_kept_at_intervals_at_branches_and_at_the_end():
    made = engine("written", cache_bytes=2**22, cache_every=32)
    assert made._worth_keeping(100, 0) == {32, 64, 96} and made._worth_keeping(100, 45) == {32, 40, 64, 96}
    assert made._worth_keeping(7, 0) == set() and len(made._worth_keeping(100_000, 0)) < 70


def test_the_cache_stays_within_its_bytes_and_holds_no_larger_memory_alive():
    async def work():
        small = engine("written", cache_bytes=60_000, cache_every=8)
        for start in range(12):
            await small.read([start] * 100)
        assert 0 < small.cache.nbytes <= 60_000 and len(small.cache) > 1
        return [tensor for node in small.cache._used for tensor in state_tensors(node.state)]

    for tensor in asyncio.run(work()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_write_the_same_answer(kind):
    async def work(**options):
        made = engine(kind, draft=6) if options.pop("draft") else engine(kind)
        made.model.double()
        ids = small_tokenizer().encode("the cat sat on the mat and the cat sat on the mat and the").ids
        return await written(made, ids, **options)

    for options in ({"temperature": 0}, {"temperature": 0.6}, {"max_tokens": 1}, {"temperature": 0, "max_tokens": 57}):
        assert asyncio.run(work(draft=True, **options)) == asyncio.run(work(draft=False, **options))


@pytest.mark.parametrize("draft", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_drawn_together_are_those_alone(kind, draft):
    prompts = [[i % 7 + 1] * (5 + 11 * i) for i in range(9)]

    def double(**options):
        made = engine(kind, **options)
        made.model.double()
        return made

    async def alone():
        return [await written(double(), ids, seed=i) for i, ids in enumerate(prompts)]

    async def together():
        made = double(cache_bytes=2**20, cache_every=8, batch=4, draft=draft)
        rows, stream = [], made.model.stream
        made.model.stream = lambda tokens, state: rows.append(len(tokens)) or stream(tokens, state)
        found = await asyncio.gather(*(written(made, ids, seed=i) for i, ids in enumerate(prompts)))
        return found, rows

    found, rows = asyncio.run(together())
    assert [each[:2] for each in found] == [each[:2] for each in asyncio.run(alone())]
    assert max(rows) <= 4 and (max(rows) > 1 or kind == "attention")  # states of unequal sizes are not joined


def test_without_batches_answers_beside_others_are_those_alone_to_the_last_bit():
    prompts = [[i % 7 + 1] * (5 + 11 * i) for i in range(9)]

    async def alone():
        return [await written(engine("written"), ids, seed=i) for i, ids in enumerate(prompts)]

    async def together():
        made = engine("written", cache_bytes=2**20, cache_every=8, batch=1)
        return await asyncio.gather(*(written(made, ids, seed=i) for i, ids in enumerate(prompts)))

    assert [each[:2] for each in asyncio.run(together())] == [each[:2] for each in asyncio.run(alone())]


def test_an_answer_that_is_given_up_leaves_the_others_as_they_are():
    async def work():
        made = engine("written")
        made.model.double()
        expected = await written(made, [5] * 20, seed=1)
        kept = asyncio.create_task(written(made, [5] * 20, seed=1))
        gone = [asyncio.create_task(written(made, [7] * 9, seed=i, max_tokens=4000)) for i in range(5)]
        for i, task in enumerate(gone):
            await asyncio.sleep(0.01 * i)
            task.cancel()
        assert await kept == expected
        await asyncio.gather(*gone, return_exceptions=True)
        assert made.active == 0 and not made._asking

    asyncio.run(work())


def test_a_call_that_fails_fails_those_who_were_in_it_and_nobody_after():
    async def work():
        made = engine("written")
        stream, broken = made.model.stream, [True]

        def sometimes(tokens, state):
            if broken and len(tokens) > 1:
                raise ValueError(broken.pop())
            return stream(tokens, state)

        made.model.stream = sometimes
        found = await asyncio.gather(*(written(made, [5] * 9, seed=i) for i in range(4)), return_exceptions=True)
        failed = [each for each in found if isinstance(each, RuntimeError)]
        assert 2 <= len(failed) <= 4 and all(isinstance(each.__cause__, ValueError) for each in failed)
        assert (await written(made, [5] * 9))[1] > 0 and made.active == 0

    asyncio.run(work())


def test_several_answers_share_one_reading():
    async def work():
        made = engine("written")
        calls, stream = [], made.model.hidden
        made.model.hidden = lambda tokens, *rest: calls.append(tokens.shape[1]) or stream(tokens, *rest)
        prompt = await made.read([5] * 20)
        for choice in range(3):
            assert [piece async for piece in made.write(prompt, request(max_tokens=4), (), choice)][-1].tokens <= 4
        return calls

    assert [each for each in asyncio.run(work()) if each > 1] == [8, 8, 4]


class Lasting(torch.nn.Identity):
    """A block that takes some time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def reading_and_drawing(block_seconds, token_seconds, blocks=12, tokens=4):
    """The order in which the blocks of a prompt and the tokens of another answer come."""
    modules = torch.nn.ModuleList(Lasting(block_seconds) for _ in range(blocks))
    order = []

    def draw():
        time.sleep(token_seconds)
        order.append("token")

    thread = ModelThread(modules, lambda: order.count("token") < tokens, draw)
    thread._usual = token_seconds

    def read():
        for block in modules:
            block(torch.zeros(1))
            order.append("block")

    async def work():
        await thread.read(read)
        for _ in range(tokens):  # those that no reader gave way to
            thread.draw_soon()
        await thread.read(lambda: None)

    asyncio.run(work())
    assert sorted(order) == ["block"] * blocks + ["token"] * tokens
    return " ".join(order)


def test_a_token_waits_for_one_block_of_a_prompt_not_for_a_piece():
    order = reading_and_drawing(block_seconds=0.05, token_seconds=0.002)
    assert order.startswith(("token block token block token block token block", "block token block token block token block token block"))


def test_quick_blocks_have_half_as_long_as_a_token_before_they_give_way():
    order = reading_and_drawing(block_seconds=0.004, token_seconds=0.04, blocks=60, tokens=4)
    runs = [len(run.split()) for run in order.strip("token ").split("token") if run.strip()]
    assert 2 < sum(runs[1:-1]) / max(1, len(runs[1:-1])) < 9, order


def test_a_server_says_what_was_cached_and_counts_it(folder):  # noqa: F811
    with serving(folder, "--cache-mb", "8", "--speculate", "4") as (server, _):
        chat = {"model": "cat", "messages": [{"role": "user", "content": "the cat sat on a mat " * 20}], "max_tokens": 9, "temperature": 0}
        status, _, first = ask(server, chat, "/v1/chat/completions")
        assert status == 200 and first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0} and first["usage"]["state_bytes"] > 0
        messages = [*chat["messages"], first["choices"][0]["message"], {"role": "user", "content": "and the hat"}]
        _, _, second = ask(server, chat | {"messages": messages}, "/v1/chat/completions")
        read = first["usage"]["prompt_tokens"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= read - 64 > 0
        text = ask(server, None, "/metrics", "GET")[2]
        figures = {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) ([\d.e+]+)$", text, re.M)}
        assert figures['gam_requests_total{route="/v1/chat/completions",status="200"}'] == 2
        assert figures['gam_tokens_total{kind="cached"}'] == second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert figures['gam_tokens_total{kind="drawn"}'] == sum(each["usage"]["completion_tokens"] for each in (first, second))
        assert figures["gam_first_token_seconds_count"] == 2 and figures["gam_cache_bytes"] > 0
        ask(server, BODY | {"model": "dog"})
        assert 'status="404"' in ask(server, None, "/metrics", "GET")[2]


def test_an_answer_keeps_its_first_space_where_the_tokenizer_is_not_byte_level():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = Engine(model=small_model(3), tokenizer=tokenizer, piece=8)
    ids = tokenizer.encode("one two").ids
    text, _, _ = asyncio.run(written(made, ids, max_tokens=4, temperature=0))
    assert "one two" + text == tokenizer.decode(ids + list(generate(made.model, ids, max_new_tokens=4, temperature=0))) and text.startswith(" ")


@pytest.mark.parametrize("draft", [0, 4])
def test_learned_positions_end_an_answer_and_refuse_a_longer_prompt(draft):
    from gam_lm.serve.protocol import RequestError

    model = small_model(small_tokenizer().get_vocab_size(), positions="learned", max_position_embeddings=32)
    made = Engine(model=model, tokenizer=Tokenizer.from_str(small_tokenizer().to_str().replace("<|endoftext|>", "<|never|>")), piece=8, draft=draft)

    async def work():
        prompt = await made.read(made.checked([5] * 30, 99))
        return [piece async for piece in made.write(prompt, request(), (), 0)]

    pieces = asyncio.run(work())
    assert (pieces[-1].tokens, pieces[-1].finish) == (3, "length")
    with pytest.raises(RequestError, match="positions end at 32"):
        made.checked([5] * 33, 99)
    with pytest.raises(RequestError, match="reads at most 20"):
        made.checked([5] * 21, 20)
