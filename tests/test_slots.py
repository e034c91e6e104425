"""What is said of a slot is what it does."""

import numpy as np
import pytest
import torch
from stacks import WINDOWED
from test_trace import STATIC, model_of

from gam_lm.diagnostics.slots import slot_uses
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_names

TEXT = torch.randint(31, (60,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("name", [STATIC, "gam-mean", "gam-slots", "gam", "gam-slots+static_path=true", WINDOWED])
def test_shares_add_up_and_no_figure_depends_on_the_window(name):
    model = model_of(name).double()
    whole, pieces = slot_uses(model, TEXT, window=64, remove=2), slot_uses(model, TEXT, window=7, remove=2)
    for a, b in zip(whole, pieces, strict=True):
        assert (a.layer, a.memory, a.slot, a.top_tokens, a.dead) == (b.layer, b.memory, b.slot, b.top_tokens, b.dead)
        assert a.mean_share == pytest.approx(b.mean_share) and a.removal_nats == pytest.approx(b.removal_nats, abs=1e-9)
        assert [share for _, _, share in a.fires_on] == pytest.approx([share for _, _, share in b.fires_on])
    assert {use.layer for use in whole} == ({0, 1, 2} if name == WINDOWED else {0, 1})  # attention has no slots
    for layer in {use.layer for use in whole}:
        for memory in {use.memory for use in whole}:
            uses = [use for use in whole if (use.layer, use.memory) == (layer, memory)]
            assert len(uses) == 6 and sum(use.mean_share for use in uses) == pytest.approx(1)
            assert sum(use.top_tokens for use in uses) == len(TEXT)
            assert sum(use.removal_nats is not None for use in uses) == 2
            if memory == "written":
                assert sum(use.write_share for use in uses) == pytest.approx(1)


@torch.no_grad()
def test_a_slot_fires_where_its_share_is_largest_and_costs_what_the_loss_says():
    model = model_of(STATIC).double()
    uses = slot_uses(model, TEXT, top=3, remove=6)
    ids = torch.tensor(TEXT)[None]
    block = model.layers[0]
    shares = (block.mixer_norm(model.embed_tokens(ids))[0] @ block.mixer.memory.bank.T).softmax(-1)

    def loss():
        return float(torch.nn.functional.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:]))

    before = loss()
    for slot, use in enumerate(uses[:6]):
        assert [share for _, _, share in use.fires_on] == pytest.approx(shares[:, slot].topk(3).values.tolist())
        assert [float(shares[place, slot]) for place, _, _ in use.fires_on] == pytest.approx([share for _, _, share in use.fires_on])
        assert [token for _, token, _ in use.fires_on] == [str(TEXT[place]) for place, _, _ in use.fires_on]
        assert use.mean_share == pytest.approx(float(shares[:, slot].mean())) and use.largest_share == pytest.approx(float(shares[:, slot].max()))
        bank = block.mixer.memory.bank
        block.mixer.memory.bank = torch.nn.Parameter(torch.cat([bank[:slot], bank[slot + 1 :]]))
        assert use.removal_nats == pytest.approx(loss() - before, abs=1e-9)
        block.mixer.memory.bank = bank
    assert loss() == before


@torch.no_grad()
def test_a_slot_that_points_away_from_every_input_is_dead_and_a_copy_of_an_embedding_is_near_it():
    model = model_of(STATIC, hidden_size=16)
    block = model.layers[0]
    listens = block.mixer_norm(model.embed_tokens.weight)
    block.mixer.memory.bank[3] = -5.0 * listens.mean(0)
    block.mixer.memory.bank[4] = 2.0 * listens[17]
    block.mixer_norm.bias.copy_(3.0 * torch.nn.functional.normalize(listens.mean(0), dim=0))
    block.mixer.memory.bank[4] = 2.0 * block.mixer_norm(model.embed_tokens.weight)[17]
    uses = slot_uses(model, TEXT, remove=0)
    assert uses[3].dead and uses[3].top_tokens == 0 and not uses[4].dead
    assert uses[4].near_address[0] == ("17", pytest.approx(1.0, abs=1e-5))
    assert all(use.removal_nats is None for use in uses)


def test_learned_positions_end_no_text():
    uses = slot_uses(model_of(STATIC, positions="learned", max_position_embeddings=16), TEXT, window=9, remove=1)
    assert sum(use.top_tokens for use in uses[:6]) == len(TEXT) and np.isfinite(uses[0].mean_share)


@pytest.mark.parametrize("name", [*(name for name in mixer_names() if name != "gam"), "gam-static+fusion=local", "gam-attention", "gam-self-attention"])
def test_a_model_without_slots_is_named(name):
    with pytest.raises(InputError, match="no memory slots"):
        slot_uses(model_of(name), TEXT)
