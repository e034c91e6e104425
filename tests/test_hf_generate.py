"""generate() of transformers gives the tokens of the model that keeps no state, for every mixer and every way of decoding."""

import copy

import pytest
import torch
from stacks import WINDOWED
from test_hf import KINDS, language_model
from transformers import pipeline
from transformers.generation.streamers import BaseStreamer

from gam_lm.checkpoint import save_model
from gam_lm.data.tokenizer import train_bpe
from gam_lm.hf import GAMCache, GAMForCausalLM
from gam_lm.hf.modeling_gam import CACHE
from gam_lm.mixers.attention_options import AttentionOptions

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LENGTH = 12


def models(kind, **changes):
    """A model in both shapes; in double precision no tie between two tokens is decided by rounding."""
    model = language_model(kind, **changes).double()
    return model, GAMForCausalLM.from_language_model(model)


@torch.no_grad()
def greedy(model, prompt, length=LENGTH):
    """The likeliest token again and again, from the whole text each time."""
    text = prompt
    for _ in range(length):
        logits, _ = model(text)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    return text


def decode(wrapped, prompt=PROMPT, **options):
    return wrapped.generate(prompt, **({"max_new_tokens": LENGTH, "do_sample": False} | options))


class Collected(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["plain", "uncached", "static", "chunked-prefill", "prompt-lookup"],
)
def test_greedy_decoding_equals_running_the_whole_text_each_time(kind, options):
    model, wrapped = models(kind)
    assert torch.equal(decode(wrapped, **options), greedy(model, PROMPT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_decoding_takes_back_what_the_model_rejects(kind, schedule):
    model, wrapped = models(kind)
    _, assistant = models("gam-slots")  # of other weights, so that most proposals are rejected
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assert torch.equal(decode(wrapped, assistant_model=assistant), greedy(model, PROMPT))
    own = copy.deepcopy(wrapped)  # of the same weights, so that all are accepted
    assert torch.equal(decode(wrapped, assistant_model=own), greedy(model, PROMPT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_prompt_generates_the_same_tokens(kind):
    model, wrapped = models(kind)
    other = torch.tensor([[7, 8, 7]])
    batch = torch.cat([PROMPT, torch.cat([torch.zeros(1, 5, dtype=torch.long), other], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    for options in ({}, {"prefill_chunk_size": 2}, {"use_cache": False}):
        found = decode(wrapped, batch, attention_mask=mask, **options)
        assert torch.equal(found[:1], greedy(model, PROMPT))
        assert torch.equal(found[1:, 5:], greedy(model, other))


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_gives_the_same_beams_with_and_without_a_cache(kind):
    _, wrapped = models(kind)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    batch = torch.cat([PROMPT, PROMPT.flip(1)])
    cached, uncached = (decode(wrapped, batch, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.allclose(cached.sequences_scores, uncached.sequences_scores)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_draws_the_same_tokens_with_and_without_a_cache(kind):
    _, wrapped = models(kind)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        drawn.append(decode(wrapped, do_sample=True, temperature=0.9, top_p=0.9, use_cache=use_cache, num_return_sequences=2))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_the_cache_of_its_beginning(kind):
    model, wrapped = models(kind)
    first = decode(wrapped, return_dict_in_generate=True, max_new_tokens=5)
    cache = first[CACHE]
    assert isinstance(cache, GAMCache)
    longer = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    kept = copy.deepcopy(cache)
    for _ in range(2):  # a copy serves another time
        assert torch.equal(decode(wrapped, longer, **{CACHE: copy.deepcopy(kept)}), greedy(model, longer))
    assert torch.equal(decode(wrapped, longer, prefill_chunk_size=2, **{CACHE: cache}), greedy(model, longer))


@pytest.mark.parametrize("kind", KINDS)
def test_streamers_get_every_token_once_and_in_order(kind):
    _, wrapped = models(kind)
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        streamer = Collected()
        text = decode(wrapped, streamer=streamer, **options)
        assert torch.equal(torch.cat(streamer.parts), text[0])
        assert streamer.ended


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_grows_with_attention_over_all_tokens_alone(kind):
    model, wrapped = models(kind)
    sizes = set()
    for length in (2, 30):
        found = decode(wrapped, return_dict_in_generate=True, max_new_tokens=length)
        sizes.add(found[CACHE].nbytes)
    unlimited = any(name == "attention" and model.config.options_of(AttentionOptions).window is None for name in model.config.mixers)
    assert (len(sizes) == 1) is not unlimited
    assert kind != WINDOWED or len(sizes) == 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_number_of_recorded_tokens_can_be_taken_back(kind):
    model, wrapped = models(kind)
    text = torch.randint(40, (1, 20))
    cache = GAMCache()

    def read(start, end):
        return wrapped(text[:, start:end], past_key_values=cache, use_cache=True).logits

    read(0, 8)
    cache.activate_past_recording()
    read(8, 11)
    read(11, 12)
    read(12, 14)
    cache.crop(-4)  # across calls
    cache.crop(-1)  # and once more
    assert cache.get_seq_length() == 9
    assert torch.allclose(read(9, 20), model(text)[0][:, 9:], atol=1e-10)
    cache.crop(0)  # accepted: nothing before can be taken back
    with pytest.raises(ValueError, match="crop takes back 1 tokens, 0 were recorded"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="use a negative number"):
        cache.crop(5)


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_repeated_like_those_of_a_tensor():
    _, wrapped = models("gam-mean")
    text, after = torch.randint(40, (3, 6)), torch.randint(40, (6, 2))

    def continued(rows, change):
        cache = GAMCache()
        cache.activate_past_recording()
        wrapped(text, past_key_values=cache, use_cache=True)
        change(cache)
        logits = wrapped(after[: len(rows)], past_key_values=cache, use_cache=True).logits
        whole = wrapped(torch.cat([text[rows], after[: len(rows)]], 1)).logits
        return torch.allclose(logits, whole[:, 6:], atol=1e-10)

    assert continued([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))
    assert continued([1], lambda cache: cache.batch_select_indices(torch.tensor([1])))
    assert continued([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2))
    assert not continued([0, 1, 2], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))


def test_a_pipeline_loads_a_run_directory_and_writes_text(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat and the dog on the log"] * 4, 280)
    model = language_model("gam", vocab_size=tokenizer.get_vocab_size())
    save_model(tmp_path, model, tokenizer)
    write = pipeline("text-generation", model=str(tmp_path), dtype=torch.float64)
    prompt = "the cat"
    [alone] = write(prompt, max_new_tokens=6, do_sample=False)
    together = write([prompt, "the dog on the mat and"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert alone["generated_text"].startswith(prompt)
    assert together[0][0] == alone
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    text = greedy(model.double(), ids, 6)[0].tolist()
    end = tokenizer.token_to_id("<|endoftext|>")
    expected = text[: text.index(end)] if end in text else text
    assert alone["generated_text"] == tokenizer.decode(expected)


def test_generation_ends_at_the_end_of_text():
    model, wrapped = models("gam-static")
    text = greedy(model, PROMPT)
    end = int(text[0, len(PROMPT[0]) + 3])
    first = text[0, len(PROMPT[0]) :].tolist().index(end)
    found = decode(wrapped, eos_token_id=end, pad_token_id=0)
    assert torch.equal(found[0], text[0, : len(PROMPT[0]) + first + 1])
