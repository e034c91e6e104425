"""The layer in somebody else's module."""

import copy
import os
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gam_lm import GAMOptions, GatedAssociativeMemory, ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_class

SIZES = {"num_memory_slots": 8, "num_heads": 2, "chunk_size": 4}
every_rule = pytest.mark.parametrize("write", ["none", "mean", "delta"])


class Foreign(nn.Module):
    """A module that knows nothing of this library but the layer."""

    def __init__(self, write="none", **factory):
        super().__init__()
        self.embedding = nn.Embedding(11, 16, **factory)
        self.norm = nn.LayerNorm(16, **factory)
        self.mixer = GatedAssociativeMemory(16, write=write, **SIZES, **factory)
        self.head = nn.Linear(16, 11, **factory)

    def forward(self, tokens):
        x = self.embedding(tokens)
        y, _ = self.mixer(self.norm(x))
        return self.head(x + y)


def loss_of(module, tokens):
    return F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("gate_activation", ["sigmoid", "silu"])
@every_rule
def test_the_layer_is_the_mixer_of_the_language_model(write, gate_activation):
    layer = GatedAssociativeMemory(16, write=write, gate_activation=gate_activation, **SIZES)
    mixer = mixer_class("gam")(ModelConfig(vocab_size=5, hidden_size=16, options=(GAMOptions(write=write, gate_activation=gate_activation, **SIZES),)))
    mixer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 16)
    assert torch.equal(layer(x)[0], mixer(x)[0])


@every_rule
def test_a_foreign_module_learns_with_it(write):
    module, tokens = Foreign(write), torch.arange(12).remainder(11).repeat(4, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    first = loss_of(module, tokens).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(module, tokens).backward()
        optimizer.step()
    assert loss_of(module, tokens).item() < first / 3


def test_an_attention_mask_serves_as_segments():
    layer, x = GatedAssociativeMemory(16, write="delta", **SIZES), torch.randn(1, 7, 16)
    padded = torch.cat([torch.randn(1, 3, 16), x], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    torch.testing.assert_close(layer(padded, segments_BT=mask)[0][:, 3:], layer(x)[0])


@every_rule
def test_a_sequence_goes_on_from_its_state(write):
    layer, x = GatedAssociativeMemory(16, write=write, **SIZES).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    first, state = layer(x[:, :5])
    second, _ = layer(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), layer(x)[0])


@every_rule
def test_it_is_built_on_the_meta_device_and_in_another_format(write):
    on_meta = Foreign(write, device="meta")
    assert all(p.is_meta for p in on_meta.parameters())
    on_meta.to_empty(device="cpu")
    torch.manual_seed(3)
    on_meta.mixer.reset_parameters()
    direct = GatedAssociativeMemory(16, write=write, **SIZES)
    torch.manual_seed(3)
    direct.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(on_meta.mixer.parameters(), direct.parameters(), strict=True))
    assert all(p.dtype == torch.bfloat16 for p in Foreign(write, dtype=torch.bfloat16).parameters())


@every_rule
def test_a_copy_computes_the_same_and_is_its_own(write):
    module, tokens = Foreign(write), torch.randint(11, (2, 9))
    twin = copy.deepcopy(module)
    assert torch.equal(twin(tokens), module(tokens))
    nn.init.zeros_(twin.mixer.gate.weight)
    assert not torch.equal(twin(tokens), module(tokens))


@every_rule
def test_autocast_trains_it(write):
    module, tokens = Foreign(write), torch.randint(11, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(module, tokens)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert abs(loss - loss_of(module, tokens)) < 0.05


@every_rule
def test_compile_takes_it_whole(write):
    torch._dynamo.reset()
    module, tokens = Foreign(write), torch.randint(11, (2, 9))
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(tokens), module(tokens))


def test_per_sample_gradients_equal_those_of_each_sample_alone():
    module, tokens = Foreign(), torch.randint(11, (3, 9))
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, sample):
        logits = torch.func.functional_call(module, parameters, (sample[None, :-1],))
        return F.cross_entropy(logits[0], sample[1:])

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for i in range(3):
        alone = torch.autograd.grad(loss_of(module, tokens[i : i + 1]), list(module.parameters()))
        for name, expected in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][i], expected)


def test_the_defaults_are_the_recommended_memory_and_published_ones_the_papers():
    recommended, published = GatedAssociativeMemory(16), GatedAssociativeMemory(16, **GAMOptions.published().to_dict())
    assert (recommended.options.write, recommended.options.write_address, recommended.options.gate_activation) == ("delta", "keys", "silu")
    assert (published.options.write, published.options.num_memory_slots, published.options.gate_activation) == ("none", 512, "sigmoid")


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="num_heads is 2, which does not divide hidden_size=15: use a divisor"):
        GatedAssociativeMemory(15, num_heads=2)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _distributed(rank, write, port, tokens, weights, found):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    module = Foreign(write)
    module.load_state_dict(weights)
    parallel = nn.parallel.DistributedDataParallel(module)
    loss_of(parallel, tokens[2 * rank : 2 * rank + 2]).backward()
    if rank == 0:
        found.update({name: p.grad.clone() for name, p in module.named_parameters()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("write", ["none", "delta"])
def test_two_processes_find_the_gradient_of_the_whole_batch(write):
    module, tokens = Foreign(write), torch.randint(11, (4, 9))
    loss_of(module, tokens).backward()
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        weights = {name: p.detach() for name, p in module.named_parameters()}
        torch.multiprocessing.spawn(_distributed, (write, _free_port(), tokens, weights, found), nprocs=2)
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name], p.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning's own making
def test_lightning_trains_it(tmp_path):
    lightning = pytest.importorskip("lightning", reason="pip install 'gam-lm[dev]'")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Foreign("delta")

        def training_step(self, batch, index):
            return loss_of(self.network, batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module, tokens = Module(), torch.arange(12).remainder(11).repeat(64, 1)
    first = loss_of(module.network, tokens).item()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=4))
    assert trainer.global_step == 48
    assert loss_of(module.network, tokens).item() < first / 3
