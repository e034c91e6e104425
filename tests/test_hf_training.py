"""Trainer, activation checkpointing and LoRA work on the adapter, and a token weighs the same however a batch is cut."""

import textwrap
from pathlib import Path

import pytest
import torch
from stacks import WINDOWED
from test_hf import KINDS, language_model, same_weights
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gam_lm.checkpoint import load_model
from gam_lm.data.tokenizer import train_bpe
from gam_lm.hf import GAMForCausalLM
from gam_lm.ops.cross_entropy import IGNORE

# peft and Trainer still ask transformers for the older name of activation checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def wrapped_model(kind="gam", **changes):
    return GAMForCausalLM.from_language_model(language_model(kind, **changes)).train()


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def nearly_equal(one, other, atol=1e-10):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=atol) for name in one)


def test_labels_are_shifted_once_and_the_loss_is_that_of_the_library():
    model = language_model("gam")
    wrapped = GAMForCausalLM.from_language_model(model)
    tokens = torch.randint(40, (3, 8))
    labels = tokens.clone()
    labels[0, 3:] = IGNORE
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), IGNORE)], 1)
    _, expected = model(tokens, targets)
    outputs = wrapped(tokens, labels=labels)
    assert torch.equal(outputs.loss, expected)
    assert outputs.logits.shape == (3, 8, 40)
    spared = wrapped(tokens, labels=labels, return_logits=False)
    assert spared.logits is None
    assert torch.allclose(spared.loss, expected)
    assert torch.allclose(wrapped(tokens, labels=labels, logits_to_keep=1).loss, expected)
    assert torch.equal(wrapped(tokens, shift_labels=targets).loss, expected)


def test_parts_of_a_batch_add_up_to_its_gradient_when_the_tokens_are_counted():
    wrapped = wrapped_model().double()
    tokens = torch.randint(40, (4, 9))
    labels = tokens.clone()
    labels[0, 2:] = labels[3, 5:] = IGNORE  # parts of unequal weight
    wrapped(tokens, labels=labels).loss.backward()
    whole = gradients(wrapped)
    counted = (labels[:, 1:] != IGNORE).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        wrapped(tokens[rows], labels=labels[rows], num_items_in_batch=counted).loss.backward()
    assert nearly_equal(gradients(wrapped), whole)
    for rows in (slice(0, 1), slice(1, 4)):
        (wrapped(tokens[rows], labels=labels[rows]).loss / 2).backward()
    assert not nearly_equal(gradients(wrapped), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_runs_each_block_twice_and_changes_no_gradient(kind):
    wrapped = wrapped_model(kind).double()
    tokens = torch.randint(40, (2, 9))
    calls = []
    for layer in wrapped.model.layers:
        layer.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    wrapped(tokens, labels=tokens).loss.backward()
    plain, plain_calls = gradients(wrapped), len(calls)
    wrapped.gradient_checkpointing_enable()
    wrapped(tokens, labels=tokens).loss.backward()
    assert len(calls) == plain_calls + 2 * len(wrapped.model.layers)
    assert nearly_equal(gradients(wrapped), plain)


def rows_of(text, tokenizer, length, count):
    ids = tokenizer.encode(text).ids
    rows = [{"input_ids": ids[i * length : (i + 1) * length]} for i in range(count)]
    for i, row in enumerate(rows):
        row["labels"] = [IGNORE] * (i % 7) + row["input_ids"][i % 7 :]
    return rows


def train(model, rows, directory, **options):
    settings = {
        "output_dir": str(directory), "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True,
        "lr_scheduler_type": "constant", "disable_tqdm": True, "max_grad_norm": 0.0, "optim": "sgd",
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(**(settings | options)), train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def text():
    return Path(textwrap.__file__).read_text(encoding="utf-8")


def test_trainer_learns_a_text_and_what_it_saves_is_a_run_directory(tmp_path, text):
    tokenizer = train_bpe([text], 300)
    rows = rows_of(text, tokenizer, 32, 48)
    model = GAMForCausalLM.from_language_model(language_model("gam", vocab_size=300, num_hidden_layers=2))
    model.init_weights()
    steps = {"max_steps": 150, "lr_scheduler_type": "linear"}  # far enough that no seed ends near the bound
    trainer = train(model, rows, tmp_path / "trained", **steps, per_device_train_batch_size=8, optim="adamw_torch", gradient_checkpointing=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[:3]) / 3 > 5 and sum(losses[-3:]) / 3 < 4
    assert trainer.evaluate()["eval_loss"] < 4
    trainer.save_model(str(tmp_path / "run"))
    assert same_weights(load_model(tmp_path / "run"), model.to_language_model())
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), model)


def test_trainer_reaches_the_same_weights_in_one_part_and_in_four(tmp_path, text):
    tokenizer = train_bpe([text], 300)
    rows = rows_of(text, tokenizer, 16, 24)
    trained = []
    for batch_size, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = wrapped_model("gam", vocab_size=300).double()
        train(model, rows, tmp_path / str(parts), per_device_train_batch_size=batch_size, gradient_accumulation_steps=parts, max_steps=3)
        trained.append(dict(model.named_parameters()))
    assert nearly_equal(*trained, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "projections"),
    [
        ("gam-static", ["gate"]),
        ("gam", ["gate", "value_proj", "out_proj", "up_proj"]),
        ("mamba", ["in_proj", "out_proj"]),
        ("attention", ["qkv_proj"]),
        (WINDOWED, ["gate", "qkv_proj"]),
    ],
)
def test_lora_trains_the_projections_alone_and_merges_into_a_plain_model(kind, projections, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = wrapped_model(kind)
    tokens = torch.randint(40, (4, 12))
    start = base(tokens).logits.detach()
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=projections, task_type="CAUSAL_LM"))
    assert torch.equal(tuned(tokens).logits, start)
    trainable = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(15):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    tuned.eval()
    generated = tuned.generate(input_ids=tokens[:1], max_new_tokens=4, do_sample=False)
    tuned.save_pretrained(tmp_path / "adapter")

    torch.manual_seed(0)
    fresh = wrapped_model(kind)
    fresh.load_state_dict({name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if "lora_" not in name})
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.allclose(again(tokens).logits, tuned(tokens).logits, atol=1e-6)
    merged = tuned.merge_and_unload()
    assert torch.allclose(merged(tokens).logits, again(tokens).logits, atol=1e-4)
    assert torch.equal(merged.generate(tokens[:1], max_new_tokens=4, do_sample=False), generated)
    assert merged.to_language_model().config == language_model(kind).config
