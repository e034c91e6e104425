"""The cost model against what torch counts and keeps."""

import json
import os

import pytest
import torch
from stacks import HYBRIDS, stack
from torch.utils.flop_counter import FlopCounterMode

from gam_lm.cli.main import run
from gam_lm.diagnostics.cost import SIZES, enlarged, model_cost
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel, count_parameters
from gam_lm.presets.models import MODELS, named_model
from gam_lm.runtime.isolation import run_isolated

T = 512
BASE = {
    "vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "dropout": 0.1, "max_position_embeddings": T,
    "options": {name: {"num_heads": 4} for name in ("gam", "attention", "gated_deltanet")},
}  # fmt: skip
ABLATIONS = [
    "gam-static+gate_activation=sigmoid", "gam-slots+static_path=true", "gam-slots+write_gate=closed", "transformer+window=64",
    "transformer-learned+window=64", "transformer+conv_kernel_size=3",
    "transformer-learned+backend=materialised",
]  # fmt: skip
NAMES = [*sorted(MODELS), *HYBRIDS, *ABLATIONS]
every_model = pytest.mark.parametrize("name", NAMES)


def solve(a_shape, b_shape, *_, **__):
    """Forward substitution: n² multiply-adds, half of them with zeros, for each right-hand side."""
    *batch, n, m = b_shape
    return torch.Size(batch).numel() * n * n * m


def attend(q_shape, k_shape, v_shape, *_, **__):
    """Attention: causal over one sequence is half of both T × T products, the diagonal whole; over a cache, or blocks of a window, both are whole."""
    b, h, t, e = q_shape
    s = k_shape[2]
    return 2 * b * h * t * (t + 1 if t == s else 2 * s) * e


def attend_backward(slope_shape, q_shape, k_shape, v_shape, *_, **__):
    """Two products for each of the forward pass; that the scores are computed once more is not counted."""
    return 2 * attend(q_shape, k_shape, v_shape)


COUNTED = {torch.ops.aten.linalg_solve_triangular: solve, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attend,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attend_backward}  # fmt: skip


def counted(call):
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        call()
    return counter.get_total_flops()


def built(name, **changes):
    torch.manual_seed(0)
    return LanguageModel(stack(name, BASE, **changes))


@every_model
def test_a_forward_pass_has_the_operations_that_torch_counts(name):
    model = built(name)
    tokens = torch.randint(96, (1, T))
    found = counted(lambda: model(tokens)) / T
    # torch counts products alone: the depthwise convolution, an outer product and Mamba's decays are multiply-adds outside of any.
    assert found <= model_cost(model.config, T).forward_flops <= 1.06 * found


@every_model
def test_training_has_three_times_the_operations(name):
    model = built(name)
    tokens = torch.randint(96, (1, T))
    found = counted(lambda: model(tokens, tokens)[1].backward()) / T
    assert model_cost(model.config, T).training_flops == pytest.approx(found, rel=0.08)


@every_model
def test_decoding_has_the_operations_that_torch_counts(name):
    model = built(name).requires_grad_(False)
    _, state = model.stream(torch.randint(96, (1, T - 1)))
    found = counted(lambda: model.stream(torch.randint(96, (1, 1)), state))
    assert found <= model_cost(model.config, T - 1).decode_flops <= 1.12 * found


@every_model
def test_parameters_by_part_add_up(name):
    for config in (stack(name, BASE), stack(name, BASE, tie_word_embeddings=False)):
        assert model_cost(config, 1).total_parameters == count_parameters(config)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "gam-slots+write_gate=closed"]
)  # which keeps less: what never writes has no gradients
def test_the_backward_pass_keeps_the_numbers_that_cost_says(name):
    """Distinct memory saved for the backward pass, weights and what does not depend on the tokens left out."""

    def kept(tokens):
        storages, alive = {}, []

        def pack(tensor):
            alive.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, tokens, return_logits=False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in storages.items() if place not in weights)

    model = built(name)
    constant = 4 * 96 * 128  # the gradient of the output head, found with the loss
    found = (kept(torch.randint(96, (1, T))) - constant) / T
    assert model_cost(model.config, T).activation_bytes == pytest.approx(found, rel=0.06)


@every_model
def test_the_state_has_the_bytes_that_cost_says(name):
    model = built(name)
    _, state = model.stream(torch.randint(96, (1, 100)))
    parts = [state.position_B, *(part for layer in state.layers for part in layer)]
    assert sum(part.numel() * part.element_size() for part in parts) == model_cost(model.config, 100).state_bytes


PROBE = """
import torch
from gam_lm.config import ModelConfig
from gam_lm.training.loop import make_optimizer, new_model, train_step
from gam_lm.training.recipe import TrainConfig

def step(parameters, peak):
    torch.set_num_threads(1)
    config = ModelConfig.from_dict(parameters["config"])
    B, T = parameters["batch"], parameters["context"]
    recipe = TrainConfig(steps=1, batch_size=B, context=T)
    model = new_model(config, 0)
    optimizer = make_optimizer(model, recipe)
    tokens = torch.randint(config.vocab_size, (B, T)).numpy()
    def steps(): train_step(model, optimizer, (tokens, tokens), recipe, 0.0, torch.float32)
    steps()
    return {"bytes": peak(steps)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gam-static", "gam", "transformer", "gated-deltanet", "mamba", "gam-hybrid"])
def test_a_training_step_takes_the_memory_that_cost_says(name, tmp_path, monkeypatch):
    """Above weights and moments, which are there before: gradients, activations, and what a pass holds for a moment."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    config = stack(name, BASE, hidden_size=256, num_hidden_layers=4, dropout=0.0)
    done = run_isolated("probe:step", {"config": config.to_dict(), "batch": 4, "context": T}, seconds=120, memory_mb=8000)
    expected = model_cost(config, T).activation_bytes * 4 * T + 4 * count_parameters(config)
    assert 0.85 * expected < done.figures["bytes"] < 1.3 * expected


@pytest.mark.parametrize("size", SIZES)
@every_model
def test_larger_models_come_near_their_size(name, size):
    target, width = SIZES[size]
    config = enlarged(stack(name, {"vocab_size": 10_000, "options": {}}), target, width)
    cost = model_cost(config, 1_000_000)
    assert config.hidden_size == width and abs(cost.total_parameters / target - 1) < 0.05
    with torch.device("meta"):
        small = LanguageModel(stack(name, BASE))
    grows = any(layer.mixer.filled_cache(1, 1, 1, dtype=torch.float32) is not None for layer in small.layers)
    assert (cost.state_bytes == model_cost(config, 1_000).state_bytes) is not grows


def test_at_a_million_tokens_attention_alone_grows():
    base = {"vocab_size": 10_000}
    gam, transformer = (model_cost(enlarged(named_model(name, base), *SIZES["1 B"]), 2**20) for name in ("gam-static", "transformer"))
    assert transformer.state_bytes > 10_000 * gam.state_bytes and transformer.decode_flops > 10 * gam.decode_flops


def test_a_context_beyond_learned_positions_is_refused():
    with pytest.raises(InputError, match="positions end at 512"):
        model_cost(stack("gam-paper", BASE), 513)


def test_inspect_cost_prints_tables_or_json(capsys):
    assert run(["inspect", "cost", "paper-wikitext2", "--model", "gam-paper", "--context", "64", "4096"]) == 0
    said = capsys.readouterr().out
    assert "22,599,680 parameters" in said and "7 B" in said and "Learned positions end at 256" in said
    assert run(["inspect", "cost", "laptop", "--context", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"as it is", "1 B", "7 B"} and report["7 B"]["contexts"][0]["state_bytes"] > 0
    assert run(["inspect", "cost", "laptop", "--context", "0"]) == 2
    assert run(["inspect", "cost", "nowhere"]) == 2
