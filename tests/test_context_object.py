"""A context equals one pass over its tokens, however it was read, forked, rewound, saved, batched and split."""

import json
import re
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from stacks import stack

from gam_lm import LanguageModel
from gam_lm.errors import InputError
from gam_lm.inference.context import Context, state_tensors
from gam_lm.inference.continuation import Continuation, Sampling
from gam_lm.inference.prompt_lookup import PromptLookup

V = 31
KINDS = ("written", "static", "attention", "mamba")


def small_model(kind, *, positions="none", most=64, dtype=torch.float64, seed=0):
    """A tiny model in double precision; the one place that knows how configurations are written."""
    torch.manual_seed(seed)
    name = {"written": "gam", "static": "gam-static"}.get(kind, kind)
    return LanguageModel(stack(name, vocab_size=V, positions=positions, max_position_embeddings=most)).to(dtype).eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return small_model(request.param)


def ids(n, *, rows=None, seed=1):
    return torch.randint(V, (n,) if rows is None else (rows, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_pass(model, tokens):
    logits, state = model.stream(tokens if tokens.ndim == 2 else tokens[None])
    return logits[:, -1], state


def same(context, model, tokens):
    logits, state = one_pass(model, tokens)
    torch.testing.assert_close(context.logits, logits, rtol=0, atol=1e-10)
    for mine, reference in zip(state_tensors(context.state), state_tensors(state), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), every=st.integers(1, 9), back=st.integers(0, 40), more=st.integers(0, 12))
@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_pieces_and_rewinding_equals_one_pass(kind, cuts, every, back, more):
    model, tokens = small_model(kind), ids(40)
    context, edges = Context(model, every=every, keep=4), [0, *sorted(cuts), 40]
    for start, end in zip(edges, edges[1:], strict=False):
        context.read(tokens[start:end])
    same(context, model, tokens)
    assert context.furthest >= min(40, every * 3 - 1)
    if back > context.furthest:
        with pytest.raises(InputError, match=f"tokens is {back}: this context can be rewound by 0 to {context.furthest}"):
            context.rewind(back)
        same(context, model, tokens)
        return
    context.rewind(back)
    if back < 40:
        same(context, model, tokens[: 40 - back])
    else:
        assert context.logits is None and context.count == 0
    if more:
        context.read(ids(more, seed=2))
        same(context, model, torch.cat([tokens[: 40 - back], ids(more, seed=2)]))
        context.rewind(min(more, context.furthest))


def test_forks_go_their_own_ways(model):
    context = Context(model, every=4)
    context.read(ids(21))
    other = context.fork()
    other.read(ids(9, seed=3))
    other.rewind(12)
    same(context, model, ids(21))
    same(other, model, ids(21)[:18])


def test_rewinding_twice_and_reading_between_is_exact(model):
    context, tokens = Context(model, every=5, keep=5), ids(30)
    context.read(tokens)
    context.rewind(9)
    context.read(ids(6, seed=4))
    context.rewind(11)
    same(context, model, tokens[:16])


def test_the_state_of_a_recurrent_model_does_not_grow_and_the_ring_is_bounded():
    context = Context(small_model("written"), every=8, keep=3)
    sizes = set()
    for _ in range(20):
        context.read(ids(16))
        sizes.add((context.nbytes, len(context.ring), context.tail.shape[1]))
    assert len(sizes) <= 3 and max(sizes)[1:] == (3, 32)


def test_rows_are_batched_and_split(model):
    first, second = ids(17), ids(17, seed=5)
    contexts = [Context(model, every=4), Context(model, every=4)]
    for context, tokens in zip(contexts, (first, second), strict=True):
        context.read(tokens)
    both = Context.batch(contexts)
    both.read(ids(3, rows=2, seed=6))
    same(both, model, torch.cat([torch.stack([first, second]), ids(3, rows=2, seed=6)], 1))
    both.rewind(10)
    for context, tokens in zip(both.split(), (first, second), strict=True):
        same(context, model, tokens[:10])
    assert Context.batch(both.split()).nbytes == both.nbytes


def test_contexts_of_unequal_lengths_are_batched_where_the_state_does_not_grow():
    model = small_model("written")
    contexts, texts = [Context(model, every=4), Context(model, every=4)], [ids(11), ids(18, seed=5)]
    for context, tokens in zip(contexts, texts, strict=True):
        context.read(tokens)
    both = Context.batch(contexts)
    both.read(ids(30, rows=2, seed=7))
    both.rewind(min(7, both.furthest))
    for context, tokens, more in zip(both.split(), texts, ids(30, rows=2, seed=7), strict=True):
        same(context, model, torch.cat([tokens, more[:23]]))
    grown = [Context(small_model("attention")) for _ in range(2)]
    grown[1].model = grown[0].model
    for context, tokens in zip(grown, texts, strict=True):
        context.read(tokens)
    with pytest.raises(InputError, match="sizes that differ"):
        Context.batch(grown)


def test_a_saved_context_goes_on_as_if_it_had_never_been_away(model, tmp_path):
    context = Context(model, every=4, keep=5)
    context.read(ids(19))
    context.save(tmp_path / "a.state")
    again = Context.load(tmp_path / "a.state", model)
    assert torch.equal(again.logits, context.logits) and again.nbytes == context.nbytes and again.furthest == context.furthest
    again.read(ids(5, seed=3))
    again.rewind(9)
    same(again, model, ids(19)[:15])
    empty = Context(model)
    empty.save(tmp_path / "b.state")
    assert Context.load(tmp_path / "b.state", model).read(ids(4)) is not None


def test_a_saved_context_is_a_file_like_others_and_a_full_disk_one_line(tmp_path):
    model = small_model("written")
    context = Context(model)
    context.read(ids(5))
    context.save(str(tmp_path / "book.state"))
    (tmp_path / "other").touch()
    assert (tmp_path / "book.state").stat().st_mode == (tmp_path / "other").stat().st_mode
    same(Context.load(str(tmp_path / "book.state"), model), model, ids(5))
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    said = r"cannot write '.*book\.state': no space is left on the device; choose another place or make room"
    with mock.patch("gam_lm.runtime.tensor_files.save_file", side_effect=full), pytest.raises(InputError, match=said):
        context.save(tmp_path / "book.state")


def test_a_context_of_another_model_or_tokenizer_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    first, second = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    model, path = small_model("written"), tmp_path / "a.state"
    context = Context(model)
    context.read(ids(9))
    context.save(path, first)
    assert Context.load(path, model, first).count == 9
    with pytest.raises(InputError, match="another tokenizer"):
        Context.load(path, model, second)
    for other in (small_model("written", seed=1), small_model("mamba"), small_model("written", dtype=torch.float32)):
        with pytest.raises(InputError, match="another model"):
            Context.load(path, other)


@pytest.mark.parametrize("damage", ["cut", "text", "no header", "header", "missing", "shape", "dtype", "tail", "ring", "absent"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, damage):
    model, path = small_model("attention"), tmp_path / "a.state"
    context = Context(model, every=4)
    context.read(ids(9))
    context.save(path)
    tensors = load_file(path)
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["gam_lm"])
    if damage == "missing":
        del tensors["state.1.0"]
    elif damage == "shape":
        tensors["state.0.0"] = tensors["state.0.0"][..., :1].contiguous()
    elif damage == "dtype":
        tensors["state.0.0"] = tensors["state.0.0"].float()
    elif damage == "tail":
        tensors["tail"][0, 3] = V
    elif damage == "ring":
        header["ring"] = header["ring"][::-1]
    elif damage == "header":
        header["keep"] = -1
    save_file(tensors, path, metadata={"gam_lm": json.dumps(header)} if damage != "no header" else {})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "text":
        path.write_text("once upon a time")
    elif damage == "absent":
        path.unlink()
    with pytest.raises(InputError, match="a.state") as error:
        Context.load(path, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("every", 0), ("keep", -1)])
def test_a_wrong_number_is_named(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}"):
        Context(small_model("written"), **{field: value})


def test_wrong_rows_and_ids_are_named_and_leave_the_context_as_it_was(model):
    context = Context(model)
    context.read(ids(6))
    with pytest.raises(InputError, match="1 rows"):
        context.read(ids(3, rows=2))
    with pytest.raises(InputError, match="the id 31"):
        context.read([V])
    same(context, model, ids(6))


def test_what_is_refused_leaves_the_context_as_it_was_also_in_its_later_pieces():
    model = small_model("written", positions="learned", most=20)
    context = Context(model, every=4)
    context.read(ids(6))
    with pytest.raises(InputError, match="the id 31"):
        context.read([*ids(9).tolist(), V])
    with pytest.raises(InputError, match="the text's length is 21, learned positions end at 20"):
        context.read(ids(15))
    assert context.count == 6
    same(context, model, ids(6))


def test_a_context_without_earlier_states_is_rewound_by_nothing():
    model = small_model("written")
    context = Context(model, every=4, keep=1)
    for n in range(1, 10):
        context.read(ids(1, seed=n))
        assert 0 <= context.furthest <= n
        context.rewind(0)
        assert context.count == n


def written(model, prompt, sampling, *, most=40, stop=frozenset(), lookup=False):
    """A continuation, and the object that wrote it."""
    context = Context(model)
    context.read(prompt)
    drafts = None
    if lookup:
        drafts = PromptLookup()
        drafts.add(prompt.tolist())
    continuation, tokens = Continuation(model, context.logits[0], context.state, sampling, stop=stop, lookup=drafts), []
    while (more := continuation.step(most - len(tokens))) and len(tokens) < most:
        tokens += more
    return tokens, continuation


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_drafts_change_nothing_but_the_number_of_calls(model, temperature):
    prompt, sampling = ids(8).repeat(4), Sampling(temperature=temperature, seed=3, top_p=0.9)
    plain, _ = written(model, prompt, sampling, most=150)
    quick, continuation = written(model, prompt, sampling, most=150, lookup=True)
    assert quick == plain and len(plain) == 150 and continuation.drafted > 0
    same_state = torch.cat([prompt, torch.tensor(continuation.read, dtype=torch.long)])
    reference = one_pass(model, same_state)[1]
    for mine, other in zip(state_tensors(continuation.state), state_tensors(reference), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_a_draft_that_is_right_saves_calls():
    model, calls = small_model("written"), []
    with torch.no_grad():
        model.embed_tokens.weight *= 40  # every token then follows itself
    stream = model.stream
    model.stream = lambda tokens, state: calls.append(tokens.shape[1]) or stream(tokens, state)
    tokens, continuation = written(model, torch.full((6,), 4), Sampling(temperature=0), lookup=True)
    assert tokens == [4] * 40 and continuation.agreed == continuation.drafted > 30 and len(calls) < 10


def test_a_stop_id_ends_the_text_also_inside_a_draft():
    model = small_model("written")
    plain, _ = written(model, ids(8).repeat(4), Sampling(temperature=0.5, seed=1))
    for stop in set(plain):
        for lookup in (False, True):
            tokens, continuation = written(model, ids(8).repeat(4), Sampling(temperature=0.5, seed=1), stop=frozenset({stop}), lookup=lookup)
            assert tokens == plain[: plain.index(stop)] and continuation.ended


@pytest.mark.parametrize("lookup", [False, True])
def test_learned_positions_end_the_text_where_generate_does(lookup):
    from gam_lm.inference.generation import generate

    model, prompt = small_model("written", positions="learned", most=50), ids(5).repeat(6)
    reference = list(generate(model, prompt.tolist(), max_new_tokens=None, seed=2))
    assert written(model, prompt, Sampling(seed=2), most=99, lookup=lookup)[0] == reference and len(reference) == 21


def test_draws_equal_those_of_generate(model):
    from gam_lm.inference.generation import generate

    how = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 5}
    assert written(model, ids(12), Sampling(**how))[0] == list(generate(model, ids(12).tolist(), max_new_tokens=40, **how))


@pytest.mark.parametrize("how", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 5e-324}])
def test_the_smallest_numbers_take_the_likeliest_token(model, how):
    assert written(model, ids(7), Sampling(**how))[0] == written(model, ids(7), Sampling(temperature=0))[0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_a_draft_is_what_followed_the_latest_longest_match(text, most):
    lookup = PromptLookup()
    lookup.add(text)
    expected = []
    for n in (4, 3, 2):
        places = [i for i in range(n, len(text)) if text[i - n : i] == text[len(text) - n :]]
        if n <= len(text) and places:
            again = text[places[-1] :]
            expected = (again * most)[:most]  # what followed, and itself again where the text ends
            break
    assert list(lookup.draft(most)) == expected


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    from gam_lm import save_model
    from gam_lm.data.tokenizer import train_bpe

    tokenizer = train_bpe(["the cat sat on the mat and the hat of the rat"] * 9, 300)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("read") / "cat"
    save_model(path, LanguageModel(stack("gam", vocab_size=tokenizer.get_vocab_size())), tokenizer)
    return path


def test_a_book_is_read_once_and_gone_on_from(run_directory, tmp_path, capsys):
    from gam_lm import generate_text, load_model
    from gam_lm.checkpoint import load_tokenizer_of
    from gam_lm.cli.main import run

    text = "the cat sat on the mat and the rat, é\n" * 60  # a line break belongs to no word: the parts have the tokens of the whole
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    first, second = tmp_path / "a.state", tmp_path / "b.state"
    assert run(["read", str(run_directory), str(tmp_path / "book.txt"), "--out", str(first), "--device", "cpu"]) == 0
    assert re.search(r"read [\d,]+ tokens in .* state of [\d,]+ bytes", capsys.readouterr().out)
    assert run(["read", str(run_directory), str(tmp_path / "book.txt"), "--out", str(second), "--state", str(first), "--device", "cpu"]) == 0
    capsys.readouterr()
    for state, times in ((first, 1), (second, 2)):
        assert run(["generate", str(run_directory), "--state", str(state), "--prompt", "the hat", "--max-new-tokens", "12", "--seed", "3", "--device", "cpu"]) == 0
        model, tokenizer = load_model(run_directory), load_tokenizer_of(run_directory)
        expected = "".join(generate_text(model, tokenizer, text * times + "the hat", max_new_tokens=12, seed=3, temperature=0.8, top_p=0.95))
        assert capsys.readouterr().out == "the hat" + expected + "\n"


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("abé .\n,\u2003😀"), max_size=300), st.integers(1, 40))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(text, characters):
    import io

    from gam_lm.cli.read import pieces
    from gam_lm.data.tokenizer import train_bpe

    tokenizer = TOKENIZERS.setdefault("bpe", train_bpe(["ab ba aab b.a, é bab a\nb"] * 5, 270))
    cut = list(pieces(io.StringIO(text, newline=""), "t", characters))
    assert "".join(cut) == text
    if all(len(piece) < 16 * characters for piece in cut):
        assert [i for piece in cut for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


TOKENIZERS = {}


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8"), (None, "cannot be read")])
def test_a_text_that_cannot_be_read_is_one_line(run_directory, tmp_path, capsys, content, said):
    from gam_lm.cli.main import run

    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(["read", str(run_directory), str(path), "--out", str(tmp_path / "a.state"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "a.state").exists()
