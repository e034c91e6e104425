"""The official models' numbers, from weights to gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gam_lm.errors import InputError
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.reference import load_reference, reference_name

ASSETS = Path(__file__).parent / "assets"
HEADS = {"transformer": 4}


def parts(file: Path) -> tuple[dict, dict, dict]:
    tensors = load_file(file)
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    grads = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    return weights, grads, tensors


@pytest.mark.parametrize("name", ["gam_tiny_f32", "gam_tiny_k4_f64", "transformer_tiny_f32", "transformer_tiny_f64"])
@pytest.mark.parametrize("return_logits", [True, False])
def test_the_official_weights_give_the_official_logits_loss_and_gradients(name, return_logits):
    weights, grads, expected = parts(ASSETS / f"{name}.safetensors")
    model = load_reference(weights, num_heads=HEADS.get(name.split("_")[0]))
    tolerance = 1e-10 if name.endswith("f64") else 1e-4

    logits, loss = model(expected["tokens"], expected["targets"], return_logits=return_logits)
    loss.backward()

    def close(ours, theirs):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()

    if return_logits:
        close(logits, expected["logits"])
    close(loss, expected["loss"].squeeze())
    own = dict(model.named_parameters())
    assert set(own) == {reference_name(k) for k in grads}
    for official, grad in grads.items():
        ours = own[reference_name(official)].grad
        close(ours.reshape(grad.shape), grad)


def test_sizes_and_dtype_come_from_the_shapes(tmp_path):
    weights, _, _ = parts(ASSETS / "gam_tiny_k4_f64.safetensors")
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "official.safetensors")
    model = load_reference(tmp_path / "official.safetensors")
    options = model.config.options_of(GAMOptions)
    assert model.embed_tokens.weight.dtype == torch.float64
    assert (options.conv_kernel_size, options.num_memory_slots, model.config.num_hidden_layers) == (4, 7, 3)
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"blocks.0.rwkv": torch.zeros(1)}, "blocks.0.rwkv"),
        (lambda w: {k: v for k, v in w.items() if "token" not in k}, "embed_tokens.weight"),
        (lambda w: w | {"blocks.0.memory_bank": torch.zeros(3, 5)}, "memory.bank"),
    ],
)
def test_weights_that_are_not_official_are_named(change, message):
    weights, _, _ = parts(ASSETS / "gam_tiny_f32.safetensors")
    with pytest.raises(InputError, match=message):
        load_reference(change(weights))


def test_a_transformer_without_its_heads_says_so():
    weights, _, _ = parts(ASSETS / "transformer_tiny_f32.safetensors")
    with pytest.raises(InputError, match="num_heads"):
        load_reference(weights)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.safetensors"):
        load_reference(tmp_path / "nothing.safetensors")
