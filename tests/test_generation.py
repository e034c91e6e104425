"""Generation, a token at a time."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.inference.compiling import obstacle
from gam_lm.inference.context import Context
from gam_lm.inference.continuation import Sampling, continue_text
from gam_lm.inference.generation import draw, generate, generate_text
from gam_lm.inference.text_stream import text_after
from gam_lm.mixers.registry import mixer_names
from gam_lm.model import LanguageModel
from gam_lm.presets.models import MODELS, named_model


def model_of(**changes):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    return LanguageModel(ModelConfig(**(sizes | changes))).eval()


BASE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "options": {"gam": {"num_heads": 2, "num_memory_slots": 8}}}
every_stack = pytest.mark.parametrize("name", [*mixer_names(), "gam-hybrid+window=5"])


@every_stack
def test_greedy_generation_equals_running_the_whole_text_each_time(name):
    model, text = LanguageModel(named_model(name, BASE)).eval(), [3, 1, 4]
    for token in generate(model, list(text), max_new_tokens=12, temperature=0):
        logits, _ = model(torch.tensor([text]))
        assert token == int(logits[0, -1].argmax())
        text.append(token)
    assert len(text) == 15


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model = model_of()
    first, again, other = (list(generate(model, [1], max_new_tokens=30, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_learned_positions_end_the_text_with_one_line_and_none_never(caplog):
    learned = model_of(positions="learned", max_position_embeddings=10)
    assert len(list(generate(learned, [1, 2, 3], max_new_tokens=100))) == 8  # the last of ten inputs still has an answer
    assert [r.getMessage() for r in caplog.records] == ["ended: learned positions end at 10 tokens; a model with positions='none' goes on"]
    endless = generate(model_of(max_position_embeddings=10), [1, 2, 3], max_new_tokens=None)
    assert len(list(itertools.islice(endless, 50))) == 50


@every_stack
def test_a_long_prompt_is_read_in_pieces_and_gives_the_same_text(name, monkeypatch):
    model, prompt = LanguageModel(named_model(name, BASE)).eval(), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    whole = list(generate(model, prompt, max_new_tokens=8, temperature=0))
    monkeypatch.setattr("gam_lm.inference.context.PIECE", 4)
    assert list(generate(model, prompt, max_new_tokens=8, temperature=0)) == whole


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-9])
def test_the_smallest_share_leaves_the_likeliest_token(top_p):
    logits, generator = torch.tensor([0.1, 3.0, 0.2]), torch.Generator().manual_seed(0)
    assert {int(draw(logits, 1.0, None, top_p, generator)) for _ in range(20)} == {1}


def test_the_function_is_public_whatever_was_imported_before():
    import gam_lm

    assert gam_lm.generate is generate


CONSTANT = [name for name, each in MODELS.items() if each.fields["mixers"][0] != "attention" and name not in ("gam-attention", "gam-self-attention")]


@pytest.mark.parametrize("name", [*CONSTANT, "transformer+window=5", "llama+window=1+conv_kernel_size=3"])
def test_the_state_does_not_grow_where_none_looks_at_all_tokens(name):
    model = LanguageModel(named_model(name, BASE))
    sizes = set()
    state = None
    for _ in range(5):
        _, state = model.stream(torch.randint(40, (1, 7)), state)
        sizes.add(sum(part.numel() for layer in state.layers for part in layer))
    assert len(sizes) == 1


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [*CONSTANT, "transformer+window=5", "llama+window=1+conv_kernel_size=3"])
def test_a_state_has_one_layout_and_holds_no_more_memory_than_it_says(name, batch):
    model = LanguageModel(named_model(name, BASE))
    state = None
    for tokens in (200, 1):
        with torch.no_grad():
            _, state = model.stream(torch.randint(40, (batch, tokens)), state)
        for part in (each for layer in state.layers for each in layer):
            assert part.untyped_storage().nbytes() == part.nbytes
            assert part.stride() == torch.empty(part.shape).stride()


def test_top_k_and_top_p_leave_only_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])

    def drawn(top_k, top_p):
        return {int(draw(logits, 1.0, top_k, top_p, generator)) for _ in range(200)}

    assert drawn(2, 1.0) == {1, 2}
    assert drawn(None, 0.5) == {1}
    assert drawn(None, 0.8) == {1, 2}
    assert drawn(None, 1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([1] * 11, {}, "the prompt's length is 11, learned positions end at 10"),
        ([], {}, "prompt is empty"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([99], {}, "id 99"),
    ],
)
def test_bad_input_is_one_line_that_names_it(prompt, options, words):
    with pytest.raises(InputError, match=words):
        list(generate(model_of(positions="learned", max_position_embeddings=10), prompt, **options))


def word_tokenizer():
    """A tokenizer whose decoder, as SentencePiece's, drops the space before the first word."""
    words = {"<unk>": 0, "▁one": 1, "▁two": 2, "▁three": 3, "�": 4, "<|endoftext|>": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3] * 4, [2, 5], [5], [5, 5], [], [1, 4]])
def test_a_text_goes_on_with_the_space_that_its_tokens_say(prompt):
    tokenizer = word_tokenizer()
    stream = text_after(tokenizer, prompt)
    after = "".join(stream.step(tokenizer, token) or "" for token in (2, 3))
    whole = tokenizer.decode([*prompt, 2, 3])
    assert after == (whole.removeprefix(tokenizer.decode(prompt)) if 4 not in prompt else "two three")


def test_every_way_to_a_continuation_keeps_its_first_space():
    model, tokenizer = model_of(vocab_size=6, tie_word_embeddings=False), word_tokenizer()
    with torch.no_grad():  # whatever comes next is "▁two"
        for token, row in enumerate(model.lm_head.weight):
            row.fill_(0 if token != 2 else 1)
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
    assert "".join(generate_text(model, tokenizer, "one", max_new_tokens=2, temperature=0)) == " two two"
    context = Context(model)
    context.read(tokenizer.encode("one").ids)
    assert "".join(continue_text(context, tokenizer, Sampling(temperature=0), max_new_tokens=2)) == " two two"


def test_text_comes_in_whole_characters():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["ab"], trainer)

    class Replay(torch.nn.Module):  # a model that always goes on with the same ids
        def __init__(self, ids):
            super().__init__()
            self.ids, self.config, self.embed_positions, self.embed_tokens = (
                ids,
                ModelConfig(vocab_size=300, positions="none"),
                None,
                torch.nn.Embedding(1, 1),
            )

            self.lm_head = torch.nn.Identity()

        def hidden(self, tokens, state=None):
            place = 0 if state is None else state
            return torch.nn.functional.one_hot(torch.tensor([[self.ids[place]]]), 300).float(), place + 1

        stream = hidden

    text = "naïve — 日本 🙂"
    ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>"), 5]
    pieces = list(generate_text(Replay(ids), tokenizer, "", max_new_tokens=None, temperature=0.0))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.slow
@pytest.mark.skipif(obstacle(torch.device("cpu")) is not None, reason="no compiler")
def test_a_compiled_step_gives_the_same_text(caplog):
    model = model_of(num_hidden_layers=1)
    eager, compiled = (list(generate(model, [3, 1, 4], max_new_tokens=20, temperature=0, compiled=each)) for each in (False, True))
    assert compiled == eager and not [record for record in caplog.records if record.name == "gam_lm"]


def test_what_cannot_be_compiled_is_said_and_generates_all_the_same(caplog, monkeypatch):
    model = model_of(mixers=("attention",))
    assert list(generate(model, [1], max_new_tokens=5, seed=0, compiled=True)) == list(generate(model, [1], max_new_tokens=5, seed=0))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert len(list(generate(model_of(), [1], max_new_tokens=5, compiled=True))) == 5
    assert [record.getMessage() for record in caplog.records] == [
        "not compiled: the state of Attention grows with every token", "not compiled: no C++ compiler 'no-such-compiler' found",
    ]  # fmt: skip
