"""What transformers passes with packed rows is used or refused, and a model that is there keeps its weights."""

import pytest
import torch
from stacks import STACKS, stack
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from gam_lm.checkpoint import save_model
from gam_lm.errors import InputError
from gam_lm.hf import GAMForCausalLM, GAMModel
from gam_lm.model import LanguageModel


def wrapped(kind="gam"):
    torch.manual_seed(0)
    return GAMForCausalLM.from_language_model(LanguageModel(stack(kind)).eval())


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("given", ["position_ids", "seq_idx", "cu_seq_lens", "all"])
def test_the_collators_packed_rows_are_read_as_texts_alone(kind, given):
    model, texts = wrapped(kind), [torch.randint(40, (n,)).tolist() for n in (5, 3, 7)]
    collate = DataCollatorWithFlattening(return_position_ids=given in ("position_ids", "all"), return_seq_idx=given in ("seq_idx", "all"),
                                         return_flash_attn_kwargs=given in ("cu_seq_lens", "all"))  # fmt: skip
    batch = {name: value for name, value in collate([{"input_ids": text} for text in texts], return_tensors="pt").items() if name != "labels"}
    assert len(batch) > 1
    packed = model(**batch).logits[0]
    alone = torch.cat([model(torch.tensor([text])).logits[0] for text in texts])
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"seq_idx": torch.zeros(1, 3, dtype=torch.int32)}, "seq_idx"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 2, 6])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])}, "cu_seq_lens_k"),
        ({"cu_seq_lens_k": torch.tensor([0, 6])}, "cu_seq_lens_k"),
    ],
)
def test_packed_rows_that_do_not_fit_are_refused(wrong, field):
    with pytest.raises(InputError, match=field):
        wrapped()(torch.randint(40, (1, 6)), **wrong)


def test_lengths_of_several_rows_are_refused():
    with pytest.raises(InputError, match="2 rows"):
        wrapped()(torch.randint(40, (2, 6)), cu_seq_lens_q=torch.tensor([0, 6, 12]))


def test_post_init_on_a_model_that_is_there_keeps_its_weights(tmp_path):
    save_model(tmp_path, LanguageModel(stack("gam")))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (loaded, loaded.model, wrapped(), GAMForCausalLM(loaded.config), GAMModel(loaded.config)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.post_init()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.init_weights()  # who asks for new values gets them
    assert not torch.equal(model.embed_tokens.weight, before["embed_tokens.weight"])
