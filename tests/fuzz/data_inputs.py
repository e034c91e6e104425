"""Data files, tokenizers and folders of texts: strategies that make them, and checks that text comes back exactly, is named as left out, or is refused in one line."""

import gzip
import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from gam_lm.data.text_files import read
from gam_lm.data.tokenizer import END_OF_TEXT, load_tokenizer, vocabulary_size
from gam_lm.data.tokens import describe, prepare
from gam_lm.errors import InputError

parts = st.sampled_from([
    END_OF_TEXT, END_OF_TEXT[:-3], "<|", "\r\n", "\r", "\n", " ", "\x85", "\u2028", "\x0b", "\x1c", "\ufeff", "\xa0", "word ", "日本", "🙂", "'s", "\0", "12",
])  # fmt: skip
texts = st.lists(parts | st.text(max_size=6), max_size=40).map("".join)
unicode_texts = texts.map(lambda text: text.encode("utf-8", "ignore").decode())


def documents_of(text):
    """The rule: what stands between ends of text, but white space alone."""
    return [document for document in text.split(END_OF_TEXT) if document.strip()]


def documents_of_file(text):
    return documents_of(text.removeprefix("\ufeff").replace("\r\n", "\n"))


def is_unicode(text):
    return text is None or not any("\ud800" <= character <= "\udfff" for character in text)


def outcome(name, raw, expected):
    """Prepare a file as a training split; ``expected`` gives its documents, or None where they are not known."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        folder.mkdir()
        (folder / name).write_bytes(raw)
        (folder / "valid.txt").write_text("some text to validate on")
        try:
            found = list(read(folder / name))
        except InputError as error:
            assert "\n" not in str(error) and name in str(error)
            str(error).encode()  # can be printed
            return False
        if expected is not None:
            assert found == expected
        if len(raw) * 2 < 24:  # less than half of the folder is named: it is one text
            return True
        if not found:
            with pytest.raises(InputError, match="no text"):
                prepare(str(folder), vocab_size=270, cache=Path(place) / "tokens")
            return True
        corpus = prepare(str(folder), vocab_size=270, cache=Path(place) / "tokens")
        train = corpus.splits["train"]
        text = corpus.tokenizer.decode(train.ids.tolist(), skip_special_tokens=False)
        assert text == "".join(document + END_OF_TEXT for document in found)
        assert train.documents == len(found) and train.bytes == sum(len(document.encode()) for document in found)
        describe(corpus).encode()
        return True


# Files: name, bytes, and the documents that must come back, or None ------------------------------------------------------------------------------------

rows = st.lists(
    st.fixed_dictionaries({"text": texts | st.none()}, optional={"id": st.text(max_size=5), "n": st.integers() | st.floats()}), max_size=30
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner)
)


@st.composite
def text_file(draw):
    if draw(st.booleans()):
        text = draw(unicode_texts)
        return "train.txt", text.encode(), documents_of_file(text) if "\0" not in text else None
    return draw(st.sampled_from(["train.txt", "train.md", "train.TXT", "train.jsonl", "train.parquet", "train.gz", "train.txt.zst"])), draw(st.binary(max_size=200)), None


@st.composite
def row_file(draw):
    if draw(st.booleans()):
        made = draw(rows)
        raw = "".join(json.dumps(row, ensure_ascii=draw(st.booleans())) + draw(st.sampled_from(["\n", "\r\n", "\n\n"])) for row in made)
        whole = all(is_unicode(row["text"]) for row in made)
        documents = [document for row in made if row["text"] is not None and is_unicode(row["text"]) for document in documents_of(row["text"])]
        return "train.jsonl", raw.encode("utf-8", "surrogatepass"), documents if whole else None
    lines = draw(st.lists(values.map(json.dumps) | st.text(max_size=20), max_size=6))
    return "train.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass"), None


@st.composite
def packed_file(draw):
    text = draw(unicode_texts).replace("\0", "") + "text that is long enough to be packed"
    raw = text.encode()
    if draw(st.booleans()):
        name, packed = "train.txt.gz", gzip.compress(raw, mtime=0)
    else:
        import zstandard

        name, packed = "train.txt.zst", zstandard.compress(raw)
    damaged = draw(_damage(packed))
    return name, damaged, documents_of_file(text) if damaged == packed else None


@st.composite
def table_file(draw):
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = draw(st.lists(unicode_texts | st.none(), max_size=30))
    kind = draw(st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.list_(pa.string())]))
    column = pa.array([[text] if text is not None else None for text in made] if pa.types.is_list(kind) else made, type=kind)
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(made))), draw(st.sampled_from(["text", "text", "content"])): column}), buffer)
    raw = buffer.getvalue().to_pybytes()
    return "train.parquet", draw(_damage(raw)), None


@st.composite
def _damage(draw, raw):
    raw = bytearray(raw)
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] ^= draw(st.integers(1, 255))
    return bytes(raw[: len(raw) - draw(st.sampled_from([0, 0, 1, 8, 40]))])


data_files = st.one_of(text_file(), row_file(), packed_file(), table_file())


# A tokenizer.json of somebody else's -------------------------------------------------------------------------------------------------------------------

SENTENCE = "the cat sat <|endoftext|> 日本 on a mat"


def tokenizer_file(content):
    """Whether a tokenizer.json is used: its ids lie in the vocabulary, and it prepares a corpus."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tokenizer.json"
        path.write_bytes(content)
        text = Path(place) / "text.txt"
        text.write_text((SENTENCE + "\n") * 40, encoding="utf-8")
        try:
            made = load_tokenizer(path)
            ids = made.encode(SENTENCE, add_special_tokens=False).ids
            assert all(0 <= each < vocabulary_size(made) for each in ids)
            corpus = prepare(str(text), tokenizer=str(path), cache=Path(place) / "tokens")
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            str(error).encode()
            return False
        train = corpus.splits["train"]
        assert train.tokens == len(train.ids) and int(train.ids.max(initial=0)) < corpus.vocab_size
        return True


# Folders -----------------------------------------------------------------------------------------------------------------------------------------------

FOLDERS = ("", "train", "valid", "notes", ".git", "deep/er", "ä ö", "\udcff")
NAMES = (
    "a.txt", "b.md", "c.jsonl", "train.txt", "validation.txt", "test.jsonl", "notes.pdf", ".hidden.txt", "noend", "z.txt.gz", "q.parquet", "UP.TXT", "\udce9.txt",
    "x\ny.txt", "i.py",
)  # fmt: skip
CONTENTS = ("text", "text", "text", "text", "row", "empty", "blank", "bytes", "link", "loop", "broken link", "locked")


@st.composite
def folders(draw):
    """Paths and what is there."""
    paths = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)).map(lambda pair: os.path.join(*pair))
    return draw(st.dictionaries(paths, st.sampled_from(CONTENTS), min_size=1, max_size=8))


def folder(made):
    """Whether a folder is used. Every file's own word is among the tokens of some split, or its name among what was left out."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        root.mkdir()
        for number, (name, what) in enumerate(made.items()):
            _put(root / name, what, f"word{number}x")
        said, handler = [], logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logger = logging.getLogger("gam_lm")
        disabled, level, logging.root.manager.disable = logging.root.manager.disable, logger.level, 0
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            corpus = prepare(str(root), vocab_size=270, cache=Path(place) / "tokens")
        except InputError as error:
            assert "\n" not in str(error), str(error)
            return False
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logging.root.manager.disable = disabled
        text = "".join(corpus.tokenizer.decode(split.ids.tolist(), skip_special_tokens=False) for split in corpus.splits.values())
        assert not any("\n" in line for line in (*said, *corpus.left_out))
        here = {name: f"word{number}x" for number, name in enumerate(made) if made[name] in ("text", "row") and (root / name).is_file()}
        absent = [name for name, word in here.items() if word not in text and not name.startswith(".git")]  # which counts as one
        counted = sum(int(line.split()[0].replace(",", "")) for line in corpus.left_out)
        assert len(absent) <= counted, (absent, corpus.left_out)
        return True


def _put(path, what, word):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            return
        if what == "link":
            path.symlink_to(path.parent)
        elif what == "loop":
            path.symlink_to(path)
        elif what == "broken link":
            path.symlink_to("nowhere")
        else:
            text = {"empty": "", "blank": " \n\t", "bytes": "\0\1"}.get(what, f"{word} " * 8)
            raw = (json.dumps({"text": text}) + "\n").encode() if path.suffix == ".jsonl" else text.encode()
            path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
            if what == "locked":
                path.chmod(0)
    except (OSError, UnicodeError):  # a file system that has no such names
        return
