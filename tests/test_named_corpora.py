"""Corpora by name: what each split holds, and what is said where the files are missing or changed."""

import hashlib
import json

import pytest

from gam_lm.data import books, gutenberg, named_texts
from gam_lm.data.corpora import load_corpus
from gam_lm.data.tokens import prepare
from gam_lm.errors import InputError


def documents(name, split, **options):
    return list(load_corpus(name, **options).splits[split]())


# Books


def test_the_index_of_books_holds_every_training_book_of_gutenberg_and_no_other_of_its_books():
    found = {book.sha256 for book in books.index()}
    ours = {split: {book.sha256 for book in gutenberg.index() if book.split == split} for split in ("train", "valid", "test")}
    assert len(found) == len(books.index()) == 882
    assert ours["train"] <= found and not found & (ours["valid"] | ours["test"])
    assert books.sizes()["train"] > 430_000_000 and len({book.shard for book in books.index()}) == 9


TEXTS = {"0.parquet": ["One — é.\n", "Two."], "1.parquet": ["Three."]}


@pytest.fixture
def shards(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    for shard, texts in TEXTS.items():
        pq.write_table(pa.table({"source": [f"s/{text[:2]}" for text in texts], "text": texts}), tmp_path / shard)
    return tmp_path


INDEX = tuple(
    books.Book(shard, f"s/{text[:2]}", len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    for shard, texts in TEXTS.items()
    for text in texts
)


def test_books_are_read_in_the_order_of_the_index_and_checked(shards):
    assert list(books.read(shards, INDEX)) == ["One — é.\n", "Two.", "Three."]
    with pytest.raises(InputError, match=r"s/Tw in .*0.parquet has the checksum"):
        list(books.read(shards, (INDEX[0], books.Book("0.parquet", "s/Tw", 4, "0" * 64), INDEX[2])))
    with pytest.raises(InputError, match="lacks 1 of its books"):
        list(books.read(shards, (*INDEX, books.Book("1.parquet", "s/more", 1, "0" * 64))))
    with pytest.raises(InputError, match="holds 's/Tw' where the index has"):
        list(books.read(shards, (INDEX[0], INDEX[2])))
    (shards / "1.parquet").unlink()
    with pytest.raises(InputError, match=r"1.parquet is missing"):
        list(books.read(shards, INDEX))


@pytest.mark.parametrize("name", ["books", "tinystories-sample", "lambada"])
def test_a_corpus_that_is_not_at_hand_says_where_its_files_belong(name, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=f"data '{name}' is not at hand.*GAM_DATA"):
        load_corpus(name)
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    with pytest.raises(InputError, match=f"data '{name}' is not at hand: {tmp_path}") as caught:
        load_corpus(name)
    assert "\n" not in str(caught.value)


# WikiText at word level


V1 = " \n = One = \n \n The <unk> article .\x0b\u2028 Same line . \n = = Part = = \n = and = \n \n = Two = \n \n The second . \n"


def test_wikitext_at_word_level_has_the_rows_and_articles_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    (tmp_path / "wikitext-2-v1").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "wikitext-2-v1" / f"{split}.txt").write_text(V1, encoding="utf-8")
    rows = documents("wikitext-2-v1", "test", rows=True)
    assert rows == [
        "",
        " = One = \n",
        "",
        " The <unk> article .\x0b\u2028 Same line . \n",
        " = = Part = = \n",
        " = and = \n",
        "",
        " = Two = \n",
        "",
        " The second . \n",
    ]
    assert documents("wikitext-2-v1", "test") == ["".join(rows[:7]), "".join(rows[7:])]
    corpus = prepare("wikitext-2-v1", tokenizer="paper", vocab_size=60)
    assert corpus.splits["valid"].documents == 10
    assert corpus.tokenizer.get_vocab()["[UNK]"] == 0 and "[UNK]" not in corpus.tokenizer.decode(
        corpus.splits["train"].ids.tolist(), skip_special_tokens=False
    )


def test_stories_of_the_published_file_are_documents_and_blank_rows_are_none(monkeypatch, tmp_path):
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    (tmp_path / "tinystories").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "tinystories" / f"TinyStories-{split}.txt").write_text("One.\nTwo.<|endoftext|>\n<|endoftext|>Three.\n")
    assert documents("tinystories", "valid") == ["One.\nTwo.", "Three.\n"]


# Small texts


def test_tiny_shakespeare_is_cut_after_nine_tenths_of_its_characters(monkeypatch, tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    monkeypatch.setattr(named_texts, "SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(text, encoding="utf-8")
    (train,), (valid,) = documents("tinyshakespeare", "train"), documents("tinyshakespeare", "valid")
    assert train + valid == text and len(train) == len(text) * 9 // 10
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(text + "changed")
    with pytest.raises(InputError, match="tinyshakespeare: .*input.txt has the checksum"):
        documents("tinyshakespeare", "train")


def test_stories_are_the_documents_of_their_sample(monkeypatch, tmp_path):
    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    (tmp_path / "tinystories-sample").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "tinystories-sample" / f"{split}.txt").write_text(f"One {split}.\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n")
    assert documents("tinystories-sample", "valid") == ["One valid.\nTwo.", "Three."]


def test_passages_are_for_evaluation_alone(monkeypatch, tmp_path):
    from gam_lm.cli.data import Data
    from gam_lm.data.tokenizer import train_bpe

    monkeypatch.setenv("GAM_DATA", str(tmp_path))
    (tmp_path / "eval").mkdir()
    file = tmp_path / "eval" / "lambada_openai.jsonl"
    file.write_text("".join(json.dumps({"context": f"He said {i},", "continuation": "no"}) + "\n" for i in range(3)))
    assert documents("lambada", "test")[:2] == ["He said 0, no", "He said 1, no"]
    train_bpe(["some text"], 260).save(str(tmp_path / "own.json"))
    assert set(prepare("lambada", tokenizer=str(tmp_path / "own.json")).splits) == {"test"}
    with pytest.raises(InputError, match="for evaluation"):
        prepare("lambada", vocab_size=260)
    with pytest.raises(InputError, match="for evaluation"):
        Data(data="lambada", tokenizer=str(tmp_path / "own.json")).prepare(0)
    file.write_text('{"context": "x"}\n')
    with pytest.raises(InputError, match="line 1 is no object with context and continuation"):
        documents("lambada", "test")
