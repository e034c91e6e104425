"""Conversations to train on: the `messages` format, laid out so that each is read alone, and only what the assistant said counts.

A row of T tokens holds whole conversations where they fit; the rest of the row is padding. A conversation of more than T tokens fills several rows, each of which
begins where the one before ended.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gam_lm.data.blocks import Marks
from gam_lm.data.corpora import Corpus
from gam_lm.data.folders import PARTS, PLACES
from gam_lm.data.packed import unpacked
from gam_lm.data.tokenizer import END_OF_TEXT, check_characters, fingerprint, load_tokenizer, vocabulary_size
from gam_lm.data.tokens import Split, TokenCorpus
from gam_lm.errors import InputError

ROLES = ("system", "user", "assistant")

Messages = list[dict[str, str]]


class Marked(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    counted: list[bool]
    """Which of the ids the assistant said."""
    text: str
    """What the assistant said."""


def read_conversations(path: Path) -> Iterator[Messages]:
    """The conversations of a .jsonl file (also .gz and .zst): in each row ``{"messages": [{"role": "user", "content": "…"}, …]}``.

    Raises:
        InputError: naming the line that is none, or has nothing that the assistant said.
    """
    if not path.is_file():
        raise InputError(f"chat is {str(path)!r}: there is no such file, give a .jsonl of conversations")
    with unpacked(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield _conversation(raw, f"chat {str(path)!r}, line {number}")


def _conversation(raw: bytes, where: str) -> Messages:
    try:
        row = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({error}): write a row as {{\"messages\": [{{\"role\": \"user\", \"content\": \"…\"}}, …]}}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: no list of messages: write a row as {{\"messages\": [{{\"role\": \"user\", \"content\": \"…\"}}, …]}}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: messages[{i}] is no message: give it a role of {', '.join(ROLES)} and a text as its content")
        check_characters(message["content"], f"{where}: messages[{i}]")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise InputError(f"{where}: the assistant says nothing, so that there is nothing to learn: give it a message, or remove the row")
    return messages


def prepare_conversations(path: Path, tokenizer_file: Path, mark: Callable[[Sequence[Mapping[str, Any]]], Marked], context: int) -> TokenCorpus:
    """The conversations of a file as token ids with their marks; the eleventh of every twenty is for validation, of ten or fewer the last.

    Args:
        path: of the .jsonl.
        tokenizer_file: the model's tokenizer.json.
        mark: encodes a conversation.
        context: T, tokens in a row.

    Raises:
        InputError: for a broken row, fewer than two conversations, or what ``mark`` refuses.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    pad = tokenizer.token_to_id(END_OF_TEXT) or 0
    digest = hashlib.sha256(path.read_bytes() if path.is_file() else b"")
    marked = [mark(messages) for messages in read_conversations(path)]
    if len(marked) < 2:
        raise InputError(f"chat {str(path)!r} has {len(marked)} conversations: give at least two, one of which is for validation")
    held_out = {i for i in range(len(marked)) if i % PARTS == PLACES["valid"]} or {len(marked) - 1}
    parts = {"train": [each for i, each in enumerate(marked) if i not in held_out], "valid": [marked[i] for i in sorted(held_out)]}
    digest.update(repr([(each.ids, each.counted) for each in marked]).encode())
    splits = {name: lay_out(part, context, pad) for name, part in parts.items()}
    source = Corpus(path.resolve().stem, {}, digest.hexdigest())
    return TokenCorpus(
        path.resolve().stem, digest.hexdigest(), f"file:{fingerprint(tokenizer)[:12]}", fingerprint(tokenizer), vocabulary_size(tokenizer), splits,
        tokenizer_file.parent, source,
    )  # fmt: skip


def lay_out(conversations: Sequence[Marked], context: int, pad: int) -> Split:
    """A split whose rows of ``context`` tokens hold whole conversations where these fit; bytes and words are those of the assistant alone."""
    ids: list[int] = []
    counted: list[bool] = []
    segments: list[int] = []

    def fill(amount: int) -> None:
        ids.extend([pad] * amount)
        counted.extend([False] * amount)
        segments.extend([0] * amount)

    for number, each in enumerate(conversations, 1):
        room = -len(ids) % context
        if len(each.ids) > room:
            fill(room)
        ids += each.ids
        counted += each.counted
        counted[len(ids) - len(each.ids)] = False  # nothing comes before it
        segments += [number] * len(each.ids)
    fill(-len(ids) % context + 1)  # a block is one token longer than a row
    text = [each.text for each in conversations]
    marks = Marks(np.array(counted, bool), np.array(segments, np.int32))
    return Split(
        np.array(ids, np.uint32), sum(len(each.encode()) for each in text), sum(len(each.split()) for each in text), len(conversations), marks
    )
