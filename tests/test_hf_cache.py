"""A cache of transformers' generate() can be forked, cropped, saved and loaded, and goes on as if the text had been read at once."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf import KINDS, language_model

from gam_lm.errors import InputError
from gam_lm.hf import GAMCache, GAMForCausalLM
from gam_lm.hf.modeling_gam import CACHE

TEXT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


def models(kind):
    model = language_model(kind).double()
    return model, GAMForCausalLM.from_language_model(model).eval()


@torch.no_grad()
def read(wrapped, cache, tokens):
    return wrapped(tokens, past_key_values=cache, use_cache=True).logits


def expected(model, tokens, start):
    with torch.no_grad():
        return model(tokens)[0][:, start:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_goes_on_in_another_process_of_the_same_model(kind, tmp_path):
    model, wrapped = models(kind)
    cache = GAMCache()
    read(wrapped, cache, TEXT[:, :7])
    cache.save(tmp_path / "text.cache", wrapped)
    loaded = GAMCache.load(str(tmp_path / "text.cache"), GAMForCausalLM.from_language_model(model))
    assert loaded.get_seq_length() == 7 and loaded.batch_size == 2
    torch.testing.assert_close(read(wrapped, loaded, TEXT[:, 7:]), expected(model, TEXT, 7), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_its_own_way_and_both_can_be_cropped(kind):
    model, wrapped = models(kind)
    cache = GAMCache()
    cache.activate_past_recording()
    read(wrapped, cache, TEXT[:, :8])
    other = cache.fork()
    other.crop(-3)
    away = torch.cat([TEXT[:, :5], TEXT[:, 9:11]], 1)
    torch.testing.assert_close(read(wrapped, other, TEXT[:, 9:11]), expected(model, away, 5), rtol=0, atol=1e-10)
    torch.testing.assert_close(read(wrapped, cache, TEXT[:, 8:]), expected(model, TEXT, 8), rtol=0, atol=1e-10)
    cache.crop(-2)
    torch.testing.assert_close(read(wrapped, cache, TEXT[:, 10:]), expected(model, TEXT, 10), rtol=0, atol=1e-10)


def test_what_was_cropped_is_not_saved(tmp_path):
    model, wrapped = models("gam")
    cache = GAMCache()
    cache.activate_past_recording()
    read(wrapped, cache, TEXT[:, :9])
    cache.crop(-4)
    cache.save(tmp_path / "text.cache", wrapped)
    loaded = GAMCache.load(tmp_path / "text.cache", wrapped)
    torch.testing.assert_close(read(wrapped, loaded, TEXT[:, 5:]), expected(model, TEXT, 5), rtol=0, atol=1e-10)


def test_generate_goes_on_from_a_saved_cache(tmp_path):
    _, wrapped = models("gam")
    prompt = TEXT[:1, :6]
    whole = wrapped.generate(prompt, max_new_tokens=6, do_sample=False)
    cache = GAMCache()
    read(wrapped, cache, prompt[:, :-1])
    cache.save(tmp_path / "text.cache", wrapped)
    again = wrapped.generate(prompt, **{CACHE: GAMCache.load(tmp_path / "text.cache", wrapped)}, max_new_tokens=6, do_sample=False)
    assert torch.equal(whole, again)


def test_a_cache_is_refused_by_another_model_and_a_broken_one_by_every_model(tmp_path):
    _, wrapped = models("gam")
    path = tmp_path / "text.cache"
    with pytest.raises(InputError, match="has read nothing"):
        GAMCache().save(path, wrapped)
    with pytest.raises(InputError, match="does not exist: write it with"):
        GAMCache.load(path, wrapped)
    cache = GAMCache()
    read(wrapped, cache, TEXT)
    cache.save(path, wrapped)
    torch.manual_seed(7)
    other = language_model("gam").double()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(InputError, match="was read by another model"):
        GAMCache.load(path, GAMForCausalLM.from_language_model(other))
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(InputError, match="its header does not fit"):
        GAMCache.load(path, wrapped)
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="broken or no saved cache"):
        GAMCache.load(path, wrapped)
