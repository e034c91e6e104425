"""A run directory is a Hugging Face model directory: the same weights, the same numbers, both ways."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from stacks import BASE, MIXED, STACKS, WINDOWED, stack
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from gam_lm.checkpoint import load_model, save_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokenizer import train_bpe
from gam_lm.errors import InputError
from gam_lm.hf import GAMCache, GAMConfig, GAMForCausalLM, GAMModel
from gam_lm.inference.int8 import quantize_int8
from gam_lm.model import LanguageModel

KINDS = ["gam-static", "gam-mean", *STACKS]


def language_model(kind="gam-static", **changes):
    model = LanguageModel(stack(kind, **changes)).eval()
    for parameter in model.parameters():  # away from the small initial values, so that every part speaks
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_and_logits_are_bit_equal_through_both_formats(kind, tied, tmp_path):
    model = language_model(kind, tie_word_embeddings=tied)
    save_model(tmp_path / "ours", model)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert same_weights(again, model)
    assert again.config == model.config
    ours_file, theirs_file = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours_file.keys() == theirs_file.keys()
    assert ("lm_head.weight" in theirs_file) is not tied
    tokens = torch.randint(40, (2, 9))
    assert torch.equal(theirs(tokens).logits, model(tokens)[0])
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is tied


def test_wrapping_shares_the_weights_both_ways():
    model = language_model("gam")
    wrapped = GAMForCausalLM.from_language_model(model)
    back = wrapped.to_language_model()
    with torch.no_grad():
        wrapped.model.embed_tokens.weight.mul_(2)
    assert same_weights(model, back)
    assert back.lm_head.weight is model.embed_tokens.weight
    tokens = torch.randint(40, (1, 5))
    assert torch.equal(wrapped(tokens).logits, model(tokens)[0])


def test_the_configuration_has_the_fields_and_defaults_of_the_library():
    theirs = GAMConfig()
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("vocab_size", "options"):
            assert getattr(theirs, field.name) == field.default
    assert theirs.to_model_config() == ModelConfig(vocab_size=10_000)
    for kind in KINDS:
        assert GAMConfig(**stack(kind).to_dict()).to_model_config() == stack(kind)
    with pytest.raises(InputError, match="num_memory_slots"):
        GAMForCausalLM(GAMConfig(options={"gam": {"num_memory_slots": 0}}))
    with pytest.raises(InputError, match="did you mean 'num_heads'"):
        GAMForCausalLM(GAMConfig(options={"gam": {"num_head": 2}}))


@pytest.mark.parametrize("kind", [WINDOWED, MIXED])
def test_a_hybrid_keeps_its_pattern_and_its_options_through_both_libraries(kind, tmp_path):
    save_model(tmp_path / "ours", language_model(kind))
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        content = json.loads((tmp_path / folder / "config.json").read_text())
        assert content["mixers"] == list(stack(kind).mixers) and set(content["options"]) == set(stack(kind).mixers)
        assert content["options"]["attention"]["window"] == (5 if kind == WINDOWED else None)
        assert load_model(tmp_path / folder).config == stack(kind)
    assert AutoConfig.from_pretrained(tmp_path / "theirs").to_model_config() == stack(kind)


def test_a_run_directory_loads_with_the_auto_classes_and_its_tokenizer_is_the_same(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat, naïve — 日本"] * 3, 300)
    model = language_model(vocab_size=tokenizer.get_vocab_size())
    save_model(tmp_path, model, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the mat — naïve"
    encoded = theirs(text)
    assert encoded["input_ids"] == tokenizer.encode(text).ids
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert theirs.decode(encoded["input_ids"]) == text
    end = tokenizer.token_to_id("<|endoftext|>")
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, theirs.padding_side) == (end, end, end, "left")
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, GAMConfig)
    assert config.eos_token_id == end
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == end
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json")).encode(text).ids == tokenizer.encode(text).ids


def test_the_body_alone_loads_and_gives_hidden_vectors(tmp_path):
    model = language_model()
    save_model(tmp_path, model)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, GAMModel)
    tokens = torch.randint(40, (2, 6))
    hidden, _ = model.hidden(tokens)
    outputs = body(tokens, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, hidden)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[0], model.embed_tokens(tokens))
    assert torch.equal(body(inputs_embeds=model.embed_tokens(tokens)).last_hidden_state, hidden)


def test_a_memory_that_a_checkpoint_lacks_starts_as_in_a_new_model(tmp_path):
    save_model(tmp_path, language_model())
    torch.manual_seed(3)
    written = BASE["options"]["gam"] | {"write": "delta", "write_address": "slots"}
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, options={"gam": written}, output_loading_info=True)
    assert report["missing_keys"] and all(".written." in name for name in report["missing_keys"])
    written = theirs.model.layers[0].mixer.written
    assert torch.allclose(written.address.norm(dim=-1), torch.ones(8))
    assert torch.equal(written.sharpness, torch.full_like(written.sharpness, 4.0))
    assert torch.equal(theirs.model.layers[0].mixer.conv.weight, load_model(tmp_path).layers[0].mixer.conv.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(kind, side):
    model = language_model(kind).double()
    wrapped = GAMForCausalLM.from_language_model(model)
    text = torch.randint(40, (1, 7))
    alone = wrapped(text).logits[0]
    padded, mask = torch.full((2, 10), 39), torch.zeros(2, 10, dtype=torch.long)
    place = slice(3, 10) if side == "left" else slice(0, 7)
    padded[0, place], mask[0, place] = text, 1
    padded[1], mask[1] = torch.randint(40, (10,)), 1
    outputs = wrapped(padded, attention_mask=mask)
    assert torch.allclose(outputs.logits[0, place], alone, atol=1e-10)
    assert torch.allclose(outputs.logits[1], wrapped(padded[1:]).logits[0], atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_start_again_separate_the_texts_of_a_packed_row(kind):
    wrapped = GAMForCausalLM.from_language_model(language_model(kind).double())
    first, second = torch.randint(40, (1, 5)), torch.randint(40, (1, 6))
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    packed = wrapped(torch.cat([first, second], 1), position_ids=positions).logits
    assert torch.allclose(packed[:, :5], wrapped(first).logits, atol=1e-10)
    assert torch.allclose(packed[:, 5:], wrapped(second).logits, atol=1e-10)


def test_resizing_the_embedding_keeps_the_old_tokens_and_the_tie(tmp_path):
    model = language_model()
    wrapped = GAMForCausalLM.from_language_model(model)
    tokens = torch.randint(40, (2, 6))
    before = wrapped(tokens).logits
    wrapped.resize_token_embeddings(48)
    assert wrapped.config.vocab_size == 48
    assert wrapped.lm_head.weight is wrapped.model.embed_tokens.weight
    assert torch.allclose(wrapped(tokens).logits[..., :40], before)
    wrapped.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.vocab_size == 48
    with pytest.raises(InputError, match="vocab_size is 48"):
        wrapped(torch.tensor([[48]]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, t: m(t, attention_mask=torch.ones(1, 1, 4, 4)), "attention_mask has the shape"),
        (lambda m, t: m(t, attention_mask=torch.tensor([[0, 1]])), r"attention_mask has the shape \(1, 2\): use \(1, 4\), 0 at"),
        (lambda m, t: m(t, attention_mask=torch.ones(1, 6)), "attention_mask has the shape"),
        (lambda m, t: m(t, attention_mask=torch.ones(2, 4)), "attention_mask has the shape"),
        (lambda m, t: m(t[:, :1], attention_mask=torch.ones(1, 4), cache=m(t[:, :2]).cache), r"use \(1, 1\) or, with the tokens of the cache, \(1, 3\)"),
        (lambda m, t: m(t, inputs_embeds=torch.ones(1, 4, 16)), "give one of them"),
        (lambda m, t: m(), "give one of them"),
        (lambda m, t: m(t, past_key_values=[1]), "cache is a list"),
    ],
)
def test_what_cannot_be_run_is_one_line_that_names_it(call, words):
    with pytest.raises(InputError, match=words):
        call(GAMForCausalLM.from_language_model(language_model()), torch.randint(40, (1, 4)))


def test_an_int8_model_is_refused_where_its_weights_would_be_drawn_anew(tmp_path):
    model = language_model("gam")
    quantize_int8(model)
    save_model(tmp_path, model)
    for load in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(InputError, match=f"{tmp_path} is int8, which transformers does not run: use the run directory that it was made from"):
            load.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model is int8"):
        GAMForCausalLM.from_language_model(model)


def test_the_core_imports_no_transformers():
    code = "import sys, gam_lm, gam_lm.model, gam_lm.checkpoint, gam_lm.training.loop, gam_lm.cli.main; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_transformers_one_line_names_the_extra(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('no')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport gam_lm.hf"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "gam_lm.hf needs transformers: pip install 'gam-lm[hf]'" in result.stderr


def test_pushing_uploads_the_model_with_its_records_and_a_card_made_from_them(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    run, uploaded = tmp_path / "run", {}
    tokenizer = train_bpe(["the cat sat on the mat"], 270)
    model = language_model("gam", vocab_size=270)
    save_model(run, model, tokenizer)
    recipe = {
        "train_config": {"steps": 12, "batch_size": 4, "context": 32, "learning_rate": 0.003, "seed": 5},
        "corpus": {"name": "cats", "sha256": "0123456789abcdef", "tokens": 1234, "bytes": 5678},
    }
    (run / "recipe.json").write_text(json.dumps(recipe))
    lines = [{"step": 10, "tokens": 1280, "train_nats": 3.0}, {"step": 12, "tokens": 1536, "train_nats": 2.9, "val_nats": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (run / "run.toml").write_text("steps = 12\n")

    class Repository:
        repo_id = "someone/cats"

    branches = {"main"}

    def upload(self, *, repo_id, folder_path, revision, **_):
        assert revision is None or revision in branches or revision.startswith("refs/pr"), "the Hub refuses a branch that is not there"
        uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
        return f"https://hub/{repo_id}/commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: Repository)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *_, **__: False)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo_id, *, branch, exist_ok: branches.add(branch))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert AutoModelForCausalLM.from_pretrained(run).push_to_hub("cats", tags=["cats"]) == "https://hub/someone/cats/commit"
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.json",
        "metrics.jsonl",
        "run.toml",
        "chat_template.jinja",
    } <= uploaded.keys()
    card = uploaded["README.md"].decode()
    for fact in (
        f"{model.count_parameters():,} parameters",
        "`gam`",
        "num_heads 2",
        "`cats`",
        "1,234 tokens",
        "| Steps | 12 |",
        "after 12 steps",
        "2.5000",
        "12.18",
        "- cats",
    ):
        assert fact in card
    (tmp_path / "copy").mkdir()
    for name, content in uploaded.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert same_weights(load_model(tmp_path / "copy"), model)

    monkeypatch.setattr(HfApi, "file_exists", lambda self, *_, **__: True)
    uploaded.clear()
    AutoModelForCausalLM.from_pretrained(run).push_to_hub("cats", revision="a-new-branch")
    AutoModelForCausalLM.from_pretrained(run).push_to_hub("cats", revision="refs/pr/3")
    assert branches == {"main", "a-new-branch"}
    assert "README.md" not in uploaded


def test_a_new_cache_is_empty_and_a_used_one_says_what_it_holds():
    cache = GAMCache()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes, cache.is_initialized) == (0, -1, 0, False)
    wrapped = GAMForCausalLM.from_language_model(language_model("gam"))
    sizes = set()
    for _ in range(3):
        wrapped(torch.randint(40, (2, 5)), use_cache=True, past_key_values=cache)
        sizes.add(cache.nbytes)
    assert (cache.get_seq_length(), cache.batch_size, len(sizes)) == (15, 2, 1)
    cache.reset()
    assert (cache.get_seq_length(), cache.state) == (0, None)
