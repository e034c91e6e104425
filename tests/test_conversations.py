"""Conversations: what is counted, what each token may see, and that training and serving write a chat alike."""

import json

import numpy as np
import pytest
import torch
from stacks import stack

from gam_lm.data.blocks import IGNORE, TrainingBlocks, evaluation_blocks
from gam_lm.data.conversations import Marked, lay_out, prepare_conversations, read_conversations
from gam_lm.data.tokenizer import END_OF_TEXT, train_bpe
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.serve.chat import TEMPLATE, Chat, compiled
from gam_lm.training.evaluate import evaluate
from gam_lm.training.optimizers import make_optimizer
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.step import train_step

MESSAGES = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Is {END_OF_TEXT} a word?"}, {"role": "assistant", "content": " No. \n"},
    {"role": "user", "content": "And this?"}, {"role": "assistant", "content": f"It is {END_OF_TEXT}, as you wrote."},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["User: Is this a word? Assistant: It is, as you wrote. System: Be kind. And No"] * 3, 320)


@pytest.fixture
def chat(tokenizer):
    return Chat(tokenizer, compiled(TEMPLATE, "test"), {"eos_token": END_OF_TEXT})


def test_only_what_the_assistant_says_counts_and_the_token_that_ends_it(chat, tokenizer):
    marked = chat.marked(MESSAGES)
    end = tokenizer.token_to_id(END_OF_TEXT)
    said = tokenizer.decode([i for i, counts in zip(marked.ids, marked.counted, strict=True) if counts], skip_special_tokens=False)
    assert said == f" No.{END_OF_TEXT} It is {END_OF_TEXT}, as you wrote.{END_OF_TEXT}"
    assert marked.ids.count(end) == 2  # those that end an answer: what people write is text
    assert tokenizer.decode(marked.ids, skip_special_tokens=False) == chat.text(MESSAGES, answer=False)
    assert marked.text == " No. \n" + f"It is {END_OF_TEXT}, as you wrote."


@pytest.mark.parametrize("answer", [2, 4])
def test_what_is_learned_to_follow_is_what_the_server_asks_for(chat, answer):
    marked = chat.marked(MESSAGES)
    prompt = chat.ids(MESSAGES[:answer])
    assert marked.ids[: len(prompt)] == prompt and marked.counted[len(prompt)] and not marked.counted[len(prompt) - 1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}", "ends no answer"),
        ("{{ messages | length }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}",
         "writes the start of a conversation otherwise"),
        ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}", "writes the start of a conversation otherwise"),
    ],
)  # fmt: skip
def test_a_template_from_which_no_mask_follows_is_refused(tokenizer, template, said):
    with pytest.raises(InputError, match=said):
        Chat(tokenizer, compiled(template, "test"), {"eos_token": END_OF_TEXT}).marked(MESSAGES)


def marked(*lengths, start=10):
    """Conversations of so many different tokens, the second half of each counted."""
    found = []
    for length in lengths:
        found.append(Marked(list(range(start, start + length)), [i >= length // 2 for i in range(length)], "x"))
        start += length
    return found


def test_a_row_holds_whole_conversations_where_they_fit_and_every_answer_is_predicted_once():
    parts = marked(5, 4, 9, 3, 20, 2)
    split = lay_out(parts, 10, pad=0)
    assert (len(split.ids) - 1) % 10 == 0 and split.documents == 6 and split.bytes == 6
    for number, part in enumerate(parts, 1):
        places = np.flatnonzero(split.marks.segments == number)
        assert split.ids[places].tolist() == part.ids
        if len(part.ids) <= 10:
            assert places[0] // 10 == places[-1] // 10
    wanted = sorted(i for part in parts for i, counts in zip(part.ids, part.counted, strict=True) if counts)
    found = []
    for tokens, targets, segments in evaluation_blocks(split.ids, context=10, batch_size=2, marks=split.marks):
        found += targets[targets != IGNORE].tolist()
        assert (segments[targets != IGNORE] > 0).all()  # a target follows a token of its own conversation
        assert ((targets != IGNORE).sum(1) > 0).all() and tokens.shape == segments.shape
    assert sorted(found) == wanted
    blocks = TrainingBlocks(split.ids, context=10, batch_size=1, seed=0, marks=split.marks)
    drawn = [blocks.batch(step)[1] for step in range(blocks.steps_per_epoch)]
    assert sorted(int(i) for targets in drawn for i in targets[targets != IGNORE]) == wanted


@pytest.mark.parametrize("name", ["gam", "transformer", "mamba"])
def test_a_conversation_in_a_row_of_several_is_read_as_if_alone(name):
    torch.manual_seed(0)
    model = LanguageModel(stack(name)).double().eval()
    parts = marked(6, 5, 7, start=1)
    together = evaluate(model, lay_out(parts, 20, pad=0), context=20, dtype=torch.float32)
    alone = [evaluate(model, lay_out([part], 20, pad=0), context=20, dtype=torch.float32) for part in parts]
    assert len(together.block_nats) == 1  # all three in one row
    assert together.block_nats.sum() == pytest.approx(sum(each.block_nats.sum() for each in alone), rel=1e-9)
    assert together.block_tokens.sum() == sum(sum(part.counted) for part in parts)


def test_a_step_has_the_loss_of_the_counted_tokens_alone_in_any_number_of_parts():
    parts, moves = marked(6, 7, 5, 8, start=1), []
    split = lay_out(parts, 13, pad=0)
    recipe = TrainConfig(batch_size=2, context=13, clip=0.0, steps=1)
    batch = TrainingBlocks(split.ids, context=13, batch_size=2, seed=0, marks=split.marks).batch(0)
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = LanguageModel(stack("gam")).double()
        before = [p.detach().clone() for p in model.parameters()]
        loss, _, counted = train_step(model, make_optimizer(model, recipe), batch, recipe.replace(accumulate=accumulate), 1e-3, torch.float32)
        moves.append(torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]))
        assert counted == int((batch[1] != IGNORE).sum())
        torch.manual_seed(0)
        reference = LanguageModel(stack("gam")).double()
        each = [
            reference(torch.tensor([part.ids[:-1]]), torch.tensor([[t if c else IGNORE for t, c in zip(part.ids[1:], part.counted[1:], strict=True)]]))[1]
            * sum(part.counted[1:]) for part in parts
        ]  # fmt: skip
        assert float(loss) == pytest.approx(sum(each).item() / counted, rel=1e-6)
    torch.testing.assert_close(*moves, rtol=1e-6, atol=1e-9)


def test_a_file_of_conversations_is_split_and_identified(tmp_path, tokenizer, chat):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"messages": [*MESSAGES[:2], {"role": "assistant", "content": str(i)}]}) + "\n\n" for i in range(45)), encoding="utf-8")
    corpus = prepare_conversations(path, tmp_path / "tokenizer.json", chat.marked, 64)
    assert (corpus.splits["train"].documents, corpus.splits["valid"].documents) == (43, 2)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark says nothing
    again = prepare_conversations(path, tmp_path / "tokenizer.json", chat.marked, 64)
    assert again.splits["train"].documents == 43
    path.write_bytes(path.read_bytes()[3:])
    again = prepare_conversations(path, tmp_path / "tokenizer.json", chat.marked, 64)
    assert again.sha256 == corpus.sha256 and (again.splits["train"].ids == corpus.splits["train"].ids).all()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[::-1]), encoding="utf-8")
    assert prepare_conversations(path, tmp_path / "tokenizer.json", chat.marked, 64).sha256 != corpus.sha256
    with pytest.raises(InputError, match="no such file"):
        list(read_conversations(tmp_path / "none.jsonl"))
