"""The official models' numbers, from weights to gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

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
        (lambda w: {k: v for k, v in w.items() if "token" not in k and k != "head.weight"}, "token_embedding.weight"),
        (lambda w: w | {"blocks.0.memory_bank": torch.zeros(3, 5)}, "blocks.0.memory_bank"),
        (lambda w: w | {"blocks.0.attn.c_proj.weight": torch.zeros(3, 5)}, "blocks.0.attn.c_proj.weight"),
        (lambda w: {k: v for k, v in w.items() if k != "blocks.1.ln2.bias"}, "blocks.1.ln2.bias"),
        (lambda w: w | {"head.weight": w["token_embedding.weight"] + 1}, "head.weight"),
        (lambda w: w | {"head.weight": 3}, "tensors by name"),
        (lambda w: w | {"token_embedding.weight": w["token_embedding.weight"].long()}, "token_embedding.weight' in int64"),
        (lambda w: w | {"pos_embedding.weight": torch.tensor(1.0)}, r"pos_embedding.weight' of shape \(\)"),
        (lambda w: {k: v.flatten() if "embedding" in k or "head" in k else v for k, v in w.items()}, "which is no matrix"),
        (lambda w: w | {"blocks.0.ffn.0.weight": torch.zeros(())}, "blocks.0.ffn.0.weight"),
        (lambda w: w | {"blocks.0.memory_bank": torch.zeros(3)}, "blocks.0.memory_bank"),
        (lambda w: w | {"blocks.0.causal_conv.weight": torch.zeros(3)}, "blocks.0.causal_conv.weight"),
        (lambda w: w | {"blocks.999999999.ln1.bias": torch.zeros(3)}, "no blocks.2"),
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


class Official(torch.nn.Module):
    """A module with the official names, whose head shares the weight of its embedding."""

    def __init__(self, weights):
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, torch.nn.Parameter(tensor.clone()))
        self.head.weight = self.token_embedding.weight


def save_with_safetensors(module, path):
    save_model(module, path)
    assert len({"token_embedding.weight", "head.weight"} & load_file(path).keys()) == 1  # it keeps one of two that share


def save_with_torch(module, path):
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in module.state_dict().items()}, path)


@pytest.mark.parametrize(("write", "name"), [(save_with_safetensors, "model.safetensors"), (save_with_torch, "model.pt"), (None, "")])
def test_every_usual_way_of_keeping_the_official_model_is_read(write, name, tmp_path):
    weights, _, expected = parts(ASSETS / "gam_tiny_f32.safetensors")
    module = Official(weights)
    if write is not None:
        write(module, tmp_path / name)
    model = load_reference(module if write is None else tmp_path / name)
    assert (model(expected["tokens"])[0] - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()


@pytest.mark.parametrize("kept", ["token_embedding.weight", "head.weight"])
def test_one_of_the_two_names_of_the_shared_weight_is_enough(kept):
    weights, _, expected = parts(ASSETS / "gam_tiny_f32.safetensors")
    left = {name: tensor for name, tensor in weights.items() if name == kept or name not in ("token_embedding.weight", "head.weight")}
    assert torch.equal(load_reference(left)(expected["tokens"])[0], load_reference(weights)(expected["tokens"])[0])


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"head.weight": Code()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt"):
        load_reference(tmp_path / "evil.pt")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_a_broken_file_is_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x00" * 50)
    with pytest.raises(InputError, match=name) as raised:
        load_reference(tmp_path / name)
    assert "\n" not in str(raised.value)
