"""From text to token ids and blocks."""

import hashlib
import http.server
import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from gam_lm.data import gutenberg, hub, stdlib
from gam_lm.data.blocks import IGNORE, TrainingBlocks, evaluation_blocks
from gam_lm.data.corpora import load_corpus
from gam_lm.data.tokenizer import END_OF_TEXT, train_bpe, train_paper
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError

TEXT = "The naïve cat — 日本 — sat.\n\n  And sat\tagain. 🙂\n"


def words(count, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "epsilon"], count)) + "\n"


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("".join(words(12, i) for i in range(400)), encoding="utf-8")
    return path


# Blocks


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("length", [6, 7, 11, 12, 53])
def test_every_token_but_the_first_is_a_target_exactly_once(length, batch_size):
    ids = np.arange(100, 100 + length, dtype=np.uint16)
    seen = []
    for tokens, targets in evaluation_blocks(ids, context=5, batch_size=batch_size):
        assert tokens.dtype == targets.dtype == np.int64 and tokens.shape == targets.shape
        kept = targets != IGNORE
        assert (targets[kept] == tokens[kept] + 1).all()  # ids count up by one
        seen += targets[kept].tolist()
    assert seen == ids[1:].tolist()


def test_blocks_do_not_depend_on_the_batch_size():
    ids = np.arange(48, dtype=np.uint16)
    one, many = (list(evaluation_blocks(ids, context=5, batch_size=n)) for n in (1, 4))
    for part in (0, 1):
        np.testing.assert_array_equal(np.concatenate([b[part] for b in one]), np.concatenate([b[part] for b in many]))


def test_the_papers_blocks_advance_by_one_more_than_the_context():
    found = [t for tokens, _ in evaluation_blocks(np.arange(20), context=5, batch_size=2, overlap=False) for t in tokens[:, 0].tolist()]
    assert found == [0, 6, 12]


def test_training_batches_are_a_function_of_seed_and_step_and_cover_every_block_once_an_epoch():
    ids = np.arange(1000, 1103, dtype=np.uint16)
    blocks, again, other = (TrainingBlocks(ids, context=10, batch_size=3, seed=seed) for seed in (1, 1, 2))
    assert (blocks.blocks_per_epoch, blocks.steps_per_epoch) == (10, 3)
    epochs = [[blocks.batch(step) for step in range(3 * e, 3 * e + 3)] for e in range(2)]
    for step in (4, 0, 5):  # in any order
        for ours, theirs in zip(again.batch(step), epochs[step // 3][step % 3], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    starts = [np.concatenate([tokens[:, 0] for tokens, _ in epoch]) for epoch in epochs]
    for each in starts:
        assert len(set(each)) == 9 and set(each) <= set(ids[::10].tolist())
    assert starts[0].tolist() != starts[1].tolist()
    assert not np.array_equal(other.batch(0)[0], blocks.batch(0)[0])
    tokens, targets = blocks.batch(0)
    assert (targets == tokens + 1).all()


def test_a_text_shorter_than_a_block_or_a_batch_says_what_is_needed():
    with pytest.raises(InputError, match="5 tokens, one block of context 8 needs 9"):
        list(evaluation_blocks(np.arange(5), context=8, batch_size=1))
    with pytest.raises(InputError, match="5 tokens, one block of context 8 needs 9"):
        TrainingBlocks(np.arange(5), context=8, batch_size=1, seed=0)
    with pytest.raises(InputError, match="batch_size is 4.*2 blocks"):
        TrainingBlocks(np.arange(20), context=8, batch_size=4, seed=0)


# Tokenizers


def test_the_byte_level_tokenizer_gives_every_text_back():
    tokenizer = train_bpe([TEXT, words(200)], 300)
    for text in (TEXT, "\x00\x7fÿ 𝔘 \r\n", "never seen: ζ"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id(END_OF_TEXT) == 0 and tokenizer.get_vocab_size() == 300


def test_the_papers_tokenizer_has_its_special_tokens_first():
    tokenizer = train_paper([words(100)], 60)
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["[UNK]", "[PAD]", "[SOS]", "[EOS]"]
    assert tokenizer.encode("alpha ζ").ids[-1] == 0


def test_a_vocabulary_that_does_not_hold_the_bytes_is_refused():
    with pytest.raises(InputError, match="vocab_size is 100.*257"):
        train_bpe([TEXT], 100)


# Prepared ids


def test_prepared_ids_are_the_documents_with_an_end_after_each(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    texts = {"train": [words(30, i) for i in range(5)], "valid": [words(8, 9), TEXT]}
    for split, documents in texts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    corpus = prepare(str(folder), vocab_size=280)
    assert set(corpus.splits) == {"train", "valid"} and corpus.name == "mine"
    for split, documents in texts.items():
        found = corpus.splits[split]
        assert corpus.tokenizer.decode(found.ids.tolist(), skip_special_tokens=False) == "".join(d + END_OF_TEXT for d in documents)
        assert found.bytes == sum(len(d.encode()) for d in documents)
        assert found.words == sum(len(d.split()) for d in documents)
        assert found.documents == len(documents) and found.tokens == len(found.ids) and found.ids.dtype == np.uint16


def test_the_tokenizer_learns_from_the_training_split_only(tmp_path):
    for split, text in (("train", "aaaa " * 200), ("valid", "bbbb " * 200)):
        (tmp_path / f"{split}.txt").write_text(text)
    vocabulary = prepare(str(tmp_path), vocab_size=300).tokenizer.get_vocab()
    assert any("aa" in token for token in vocabulary) and not any("bb" in token for token in vocabulary)


def test_prepared_ids_are_found_again_and_made_anew_when_the_text_changes_or_the_cache_is_damaged(novel, caplog):
    first = prepare(str(novel), vocab_size=280)
    made = (first.directory / "train.bin").stat().st_mtime_ns
    again = prepare(str(novel), vocab_size=280)
    assert (again.directory / "train.bin").stat().st_mtime_ns == made and again.sha256 == first.sha256
    whole = np.array(again.splits["train"].ids)
    (first.directory / "train.bin").unlink()
    (first.directory / "train.bin").write_bytes(b"short")
    np.testing.assert_array_equal(prepare(str(novel), vocab_size=280).splits["train"].ids, whole)
    novel.write_text(novel.read_text() + "more\n")
    changed = prepare(str(novel), vocab_size=280)
    assert changed.sha256 != first.sha256 and changed.directory != first.directory


def test_no_temporary_folder_stays_behind_when_preparing_fails(novel, monkeypatch, tmp_path):
    import gam_lm.data.tokens as module

    monkeypatch.setattr(module, "make", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="no space is left"):
        prepare(str(novel), vocab_size=280, cache=tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".locks"]


def test_any_tokenizer_json_can_be_used(novel, tmp_path):
    train_bpe([words(500)], 262).save(str(tmp_path / "own.json"))
    corpus = prepare(str(novel), tokenizer=str(tmp_path / "own.json"))
    assert corpus.vocab_size == 262 and corpus.tokenizer_name.startswith("file:")


def test_a_single_source_is_split_by_document_or_by_whole_lines(tmp_path, novel):
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(60)))
    many = {name: list(documents()) for name, documents in load_corpus(str(tmp_path / "many.jsonl")).splits.items()}
    assert sorted(itertools.chain(*many.values())) == sorted(f"document {i}" for i in range(60))
    assert len(many["valid"]) == len(many["test"]) == 3
    one = {name: "".join(documents()) for name, documents in load_corpus(str(novel)).splits.items()}
    assert sorted("".join(one.values()).splitlines()) == sorted(novel.read_text().splitlines())
    assert all(len(text) > 200 for text in one.values())


def test_a_folder_without_validation_takes_some_of_its_training_documents(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(40):
        (tmp_path / "train" / f"{i:02}.txt").write_text(f"text {i}")
    splits = {name: list(documents()) for name, documents in load_corpus(str(tmp_path)).splits.items()}
    assert len(splits["valid"]) == 2 and not set(splits["valid"]) & set(splits["train"])


def test_rows_can_be_limited(tmp_path):
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(100)))
    limited = prepare(str(tmp_path / "many.jsonl"), vocab_size=260, row_limits={"train": 7})
    assert limited.splits["train"].documents == 7 and limited.splits["valid"].documents == 5


# The built-in corpus


def test_the_built_in_corpus_is_real_prose_without_repeats():
    splits = {name: list(documents()) for name, documents in stdlib.splits().items()}
    everything = list(itertools.chain(*splits.values()))
    assert len(set(everything)) == len(everything)
    size = {name: sum(len(d.encode()) for d in documents) for name, documents in splits.items()}
    assert 1_000_000 < sum(size.values()) < 5_000_000
    assert 0.01 < size["valid"] / sum(size.values()) < 0.12 and 0.01 < size["test"] / sum(size.values()) < 0.12
    assert any("Return a shallow copy" in d for d in everything)
    assert splits == {name: list(documents()) for name, documents in stdlib.splits().items()}


# The novels


def test_the_index_names_every_book_once():
    books = gutenberg.index()
    assert [sum(book.split == split for book in books) for split in ("train", "valid", "test")] == [66, 4, 4]
    assert len({book.number for book in books}) == len({book.name for book in books}) == 74
    assert all(len(book.sha256) == 64 for book in books)


BOOK = "\ufeffProduced by someone\r\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n  Chapter 1\r\nText — é.\r\n\r\n*** END OF THE PROJECT ***\r\nlicence\r\n"
CLEAN = "Chapter 1\nText — é."


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/7" else 404)
            self.end_headers()
            if self.path == "/7":
                self.wfile.write(BOOK.encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/{{number}}"
        running.shutdown()


def book(number=7, text=CLEAN):
    return gutenberg.Book("x", "train", number, len(text.encode()), hashlib.sha256(text.encode()).hexdigest())


def test_a_book_is_downloaded_once_cleaned_and_checked(server, tmp_path):
    assert gutenberg.read(book(), server) == CLEAN
    assert gutenberg.read(book(), "http://127.0.0.1:9/{number}") == CLEAN  # from the cache
    with pytest.raises(InputError, match="x.txt has the checksum"):
        gutenberg.read(book(text="another edition"), server)


def test_a_book_that_cannot_be_had_says_what_to_do(server):
    with pytest.raises(InputError, match="x cannot be downloaded.*gam data prepare gutenberg"):
        gutenberg.read(book(number=8), server)


def test_a_local_copy_of_a_book_is_used_where_there_is_one(monkeypatch, tmp_path):
    path = tmp_path / "gutenberg" / "train" / "x.txt"
    path.parent.mkdir(parents=True)
    path.write_text(CLEAN, encoding="utf-8")
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    assert gutenberg.read(book(), "http://127.0.0.1:9/{number}") == CLEAN
    path.write_text("changed")
    with pytest.raises(InputError, match="checksum"):
        gutenberg.read(book())


# The Hub


WIKI = ["", " = One = \n", "", " The first article . \n", " == Part == \n", " a = b = \n", "", " = Two = \n", "", " The second . \n"]


def parquet(path: Path, rows):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows}), path)


@pytest.fixture
def hub_copy(tmp_path):
    """A data set in the layout in which the Hub serves parquet."""
    root = tmp_path / "wikitext-2"
    for split, rows in (("train", WIKI * 3), ("validation", WIKI), ("test", WIKI)):
        parquet(root / f"{split}-00000-of-00001.parquet", rows)
    return root


def test_parquet_in_the_layout_of_the_hub_goes_through_datasets(hub_copy):
    pytest.importorskip("datasets")
    rows = hub.load_rows("wikitext-2", str(hub_copy))
    assert {split: list(documents()) for split, documents in rows.items()} == {"train": WIKI * 3, "valid": WIKI, "test": WIKI}


def test_a_local_copy_is_used_and_rows_are_joined_to_articles(hub_copy, monkeypatch):
    monkeypatch.setenv("GAM_DATA", str(hub_copy.parent))
    articles = list(load_corpus("wikitext-2").splits["valid"]())
    assert articles == ["".join(WIKI[:7]), "".join(WIKI[7:])]
    assert list(load_corpus("wikitext-2", rows=True).splits["valid"]()) == WIKI


def test_the_original_archive_of_wikitext_gives_the_same_rows(tmp_path, monkeypatch):
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.raw").write_text(" \n".join(["", " = One = ", " Text . ", ""]), encoding="utf-8")
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    assert list(load_corpus("wikitext-2", rows=True).splits["valid"]()) == ["", " = One =  \n", " Text .  \n"]


def test_the_papers_protocol_encodes_rows_without_separators(hub_copy, monkeypatch):
    monkeypatch.setenv("GAM_DATA", str(hub_copy.parent))
    corpus = prepare("wikitext-2", tokenizer="paper", vocab_size=60)
    tokenizer = corpus.tokenizer
    assert corpus.splits["valid"].ids.tolist() == [i for row in WIKI for i in tokenizer.encode(row).ids]


def test_a_corpus_that_is_not_in_the_cache_says_how_to_bring_it(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(InputError, match=r"'tinystories' is not in the cache.*gam data prepare tinystories.*copy its folder.*hf") as caught:
        load_corpus("tinystories")
    assert "\n" not in str(caught.value)


def test_a_local_copy_without_its_training_split_is_named(tmp_path, monkeypatch):
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.valid.raw").write_text("text")
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    with pytest.raises(InputError, match="no file of the train split"):
        load_corpus("wikitext-2")


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.md", b" \n\n ", "no text"),
        ("binary.txt", b"text\x00more", "binary .a NUL byte at byte 4."),
        ("latin.txt", "caf\xe9".encode("latin-1") + b" and more", "not UTF-8 .byte 3."),
        ("broken.parquet", b"PAR1 not really", "broken parquet"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2: no JSON"),
        ("numbers.jsonl", b'{"text": "fine"}\n{"text": 5}\n', "line 2: field 'text' holds no text"),
        ("columns.jsonl", b'{"a": "x", "b": "y"}\n', "has the columns a, b"),
        ("list.jsonl", b"[1]\n", "line 1: no JSON object"),
        ("picture.png", b"\x89PNG", "of a kind that cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        prepare(str(tmp_path / name), vocab_size=280)
    assert "\n" not in str(caught.value)
    assert name.split(".")[0] in str(caught.value)


def test_a_path_that_leads_nowhere_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        prepare(str(tmp_path / "nothing.txt"))
    with pytest.raises(InputError, match="a folder with no file"):
        prepare(str(tmp_path))
    with pytest.raises(InputError, match="did you mean 'gutenberg'"):
        prepare("gutenburg")


def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path, novel):
    with pytest.raises(InputError, match="nothing.json.*that exists"):
        prepare(str(novel), tokenizer=str(tmp_path / "nothing.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match="broken.json.*cannot be read"):
        prepare(str(novel), tokenizer=str(tmp_path / "broken.json"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_not_be_written_is_named(novel, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match="permission is denied"):
        prepare(str(novel), vocab_size=280, cache=locked / "cache")
