"""The first part of a validation split has the bytes and words of exactly its ids."""

import numpy as np

from gam_lm.data.first_part import bytes_of_tokens, text_of, with_first_tokens
from gam_lm.data.tokenizer import train_bpe
from gam_lm.data.tokens import prepare

WORDS = ["Öl", "naïve", "дом", "家", "plain", "a"]


def test_bytes_are_those_of_the_text_to_the_byte(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("valid", 30)):
        (tmp_path / "text" / split).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "text" / split / f"{i}.txt").write_text(" ".join(draw.choice(WORDS, 20)) + "\n", encoding="utf-8")
    corpus = prepare(str(tmp_path / "text"), vocab_size=300)
    valid, end = corpus.splits["valid"], corpus.tokenizer.token_to_id("<|endoftext|>")
    lengths = bytes_of_tokens(corpus.tokenizer)
    assert lengths[valid.ids].sum() == valid.bytes and lengths[end] == 0
    assert with_first_tokens(corpus, "valid", valid.tokens) is corpus
    border = int(np.flatnonzero(valid.ids == end)[4]) + 1  # five documents
    part = with_first_tokens(corpus, "valid", border).splits["valid"]
    text = text_of(corpus.tokenizer, part.ids)
    assert (part.tokens, part.bytes, part.words) == (border, len(text.encode()), 5 * 20)


def test_an_added_token_counts_its_bytes_and_not_its_characters():
    tokenizer = train_bpe(WORDS, 300)
    tokenizer.add_tokens(["дом家"])
    ids = np.array(tokenizer.encode("Öl дом家 a").ids)
    assert tokenizer.token_to_id("дом家") in ids and bytes_of_tokens(tokenizer)[ids].sum() == len("Öl дом家 a".encode())


def test_a_tokenizer_that_is_not_byte_level_keeps_the_split_whole(tmp_path):
    (tmp_path / "text").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "text" / f"{split}.txt").write_text("one two three four " * 50, encoding="utf-8")
    corpus = prepare(str(tmp_path / "text"), tokenizer="paper", vocab_size=60)
    assert bytes_of_tokens(corpus.tokenizer) is None and with_first_tokens(corpus, "valid", 5) is corpus
