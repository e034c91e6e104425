"""Encoding word by word and on all cores gives the ids that the tokenizer gives for the whole text."""

import io
import signal
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from gam_lm.data import encoding
from gam_lm.data.encoding import Encoder, encode_all
from gam_lm.data.pieces import cut, may_be_cut
from gam_lm.data.tokenizer import END_OF_TEXT, fingerprint, literal, load_tokenizer, plain, sample, train_bpe, train_paper, vocabulary_size

PROSE = "It's 3 o'clock, isn't it? \n\n  “Yes” — don't\tsay…  naïve ÿ日本 🙂 a.b  c !! 12 34\r\n" * 5
BPE = train_bpe([PROSE], 330)
PAPER = train_paper([PROSE], 90)

spaces = st.sampled_from([" ", "\n", "\t", "\r", "\xa0", "\u2028", "\x85", "\u3000", "\x0b", "\x1c", "\x1f", "  ", " \n "])
texts = st.lists(spaces | st.text(max_size=4) | st.sampled_from(["it's", "…", "'t", "12", "<|endoftext|>", "ab"]), max_size=30).map("".join)
texts = texts.filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text))


def ids(encoded, dtype="uint16"):
    return np.frombuffer(encoded.ids, dtype=dtype).tolist()


@pytest.mark.parametrize("tokenizer", [BPE, PAPER], ids=["bpe", "paper"])
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_the_ids_of_the_words_are_those_of_the_text(tokenizer, text):
    found = Encoder(tokenizer, "uint16")(text)
    assert ids(found) == tokenizer.encode(text, add_special_tokens=False).ids
    assert found.words == len(text.split())


@settings(max_examples=200, deadline=None)
@given(text=texts, size=st.integers(1, 12))
def test_pieces_are_the_text_and_their_ids_are_its_ids(text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text and all(len(piece) >= size for piece in pieces[:-1])
    assert [i for piece in pieces for i in BPE.encode(piece).ids] == BPE.encode(text).ids


def test_every_white_space_character_of_unicode_is_a_place_to_cut_but_the_four_separators_of_ascii():
    pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def words(text):
        return [word for word, _ in pattern.pre_tokenize_str(text)]

    spaces = [chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()]
    differs = {
        space
        for space in spaces
        for start in "a.1'"
        for end in ("b", f"{space}b", " b", ".")
        if words(start) + words(space + end) != words(start + space + end)
    }
    assert differs == set("\x1c\x1d\x1e\x1f")


def changed(**parts):
    tokenizer = Tokenizer.from_str(BPE.to_str())
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_tokenizer_whose_words_depend_on_what_stands_before_them_is_given_whole_texts():
    assert may_be_cut(BPE) and may_be_cut(PAPER)
    wide = changed()
    wide.add_special_tokens([AddedToken("<a b>", lstrip=False, rstrip=False)])
    greedy = changed()
    greedy.add_special_tokens([AddedToken("<a>", rstrip=True)])
    others = [
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        changed(pre_tokenizer=pre_tokenizers.Metaspace()),
        changed(normalizer=normalizers.Prepend("x")),
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[], dropout=0.1)),
        wide,
        greedy,
    ]
    for tokenizer in others:
        assert not may_be_cut(tokenizer)
        for text in (" a b\n c", "<a b> <a>  x"):
            if tokenizer.model.dropout is None:
                assert ids(Encoder(tokenizer, "uint32")(text), "uint32") == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def file(tmp_path):
    BPE.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


PIECES = [f"piece {i}: {PROSE}" for i in range(40)]


@pytest.mark.parametrize("cores", [1, 3])
def test_pieces_come_back_in_their_order_from_any_number_of_processes(monkeypatch, file, cores):
    monkeypatch.setattr(encoding, "ALONE_CHARACTERS", 10)
    monkeypatch.setattr(encoding, "_cores", lambda: cores)
    found = list(encode_all(iter(PIECES), Encoder(BPE, "uint16"), file))
    assert [ids(each) for each in found] == [BPE.encode(piece).ids for piece in PIECES]
    assert [each.words for each in found] == [len(piece.split()) for piece in PIECES]


def test_a_process_that_is_killed_ends_preparation_with_one_line(monkeypatch, file):
    from gam_lm.errors import InputError

    monkeypatch.setattr(encoding, "ALONE_CHARACTERS", 10)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    started = encoding._start
    processes = []

    def start(*arguments):
        processes.append(started(*arguments))
        processes[-1].send_signal(signal.SIGKILL)
        return processes[-1]

    monkeypatch.setattr(encoding, "_start", start)
    with pytest.raises(InputError, match="a process that encodes text was killed"):
        list(encode_all(iter(PIECES), Encoder(BPE, "uint16"), file))
    assert all(process.poll() is not None for process in processes)


def test_processes_end_when_preparation_stops_early(monkeypatch, file):
    monkeypatch.setattr(encoding, "ALONE_CHARACTERS", 10)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    started, processes = encoding._start, []
    monkeypatch.setattr(encoding, "_start", lambda *a: processes.append(started(*a)) or processes[-1])
    stream = encode_all(iter(PIECES), Encoder(BPE, "uint16"), file)
    next(stream), next(stream)
    stream.close()
    assert processes and all(process.poll() == 0 for process in processes)


def test_a_process_answers_each_text_with_its_ids_until_its_input_ends(monkeypatch, file):
    asked, answered = io.BytesIO(), io.BytesIO()
    for text in ("It's\n", "", "naïve"):
        encoding._send(asked, text.encode(), 0)
    asked.seek(0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(asked))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(answered))
    encoding._serve(str(file), "uint16")
    answered.seek(0)
    for text in ("It's\n", "", "naïve"):
        raw, words = encoding._receive(answered)
        assert np.frombuffer(raw, dtype="uint16").tolist() == BPE.encode(text).ids and words == len(text.split())


# What a tokenizer.json asks for beside ids


def test_truncation_padding_and_templates_are_switched_off_and_nothing_else():
    from tokenizers import processors

    stored = changed(post_processor=processors.TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 0)]))
    stored.enable_truncation(4)
    stored.enable_padding(length=64)
    assert len(stored.encode(PROSE).ids) == 64
    assert plain(stored).encode(PROSE).ids == BPE.encode(PROSE).ids
    assert len(stored.encode(PROSE).ids) == 64  # a copy was changed
    assert fingerprint(plain(BPE)) == fingerprint(BPE)


def test_a_stranger_cannot_write_special_tokens():
    text = f"a{END_OF_TEXT}b"
    assert BPE.encode(text).ids.count(0) == 1
    assert 0 not in literal(BPE).encode(text).ids
    assert BPE.decode(literal(BPE).encode(text).ids, skip_special_tokens=False) == text


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path):
    assert vocabulary_size(BPE) == BPE.get_vocab_size() == 1 + max(BPE.get_vocab().values())
    holes = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    holes.pre_tokenizer = pre_tokenizers.Whitespace()
    holes.save(str(tmp_path / "holes.json"))
    assert vocabulary_size(load_tokenizer(tmp_path / "holes.json")) == 70_001


# The text that a tokenizer is trained on


def documents(count):
    rng = np.random.default_rng(0)
    return [" ".join(map(str, rng.integers(0, 50, 40_000))) for _ in range(count)]


def test_a_text_that_is_not_long_is_taken_whole_and_gives_the_tokenizer_of_its_documents():
    some = documents(3)
    taken = sample(some)
    assert "".join(taken.pieces) == "".join(some) and taken.bytes == taken.total == sum(map(len, some))
    assert fingerprint(train_bpe(taken.pieces, 400)) == fingerprint(train_bpe(some, 400))


def test_of_a_long_text_a_random_sample_of_pieces_from_all_over_is_taken():
    some = [f"document{i}" + " xy" * 20_000 for i in range(20)]
    total = sum(map(len, some))
    taken = sample(some, whole=total - 1, size=total // 2)
    assert taken.total == total and 0.4 * total < taken.bytes <= total // 2 and taken.bytes == sum(map(len, taken.pieces))
    assert taken == sample(iter(some), whole=total - 1, size=total // 2) != sample(some, whole=total - 1, size=total // 2, seed=1)
    starts = [int(piece[8:].split()[0]) for piece in taken.pieces if piece.startswith("document")]
    assert starts == sorted(starts) and starts[-1] - starts[0] > 10
    assert sample(some, whole=total, size=1).bytes == total
