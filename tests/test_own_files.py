"""The user's own files: nothing is dropped or misread in silence."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gam_lm.data import text_files
from gam_lm.data.corpora import load_corpus
from gam_lm.data.left_out import LeftOut
from gam_lm.data.tokenizer import END_OF_TEXT, train_bpe
from gam_lm.data.tokens import describe, prepare
from gam_lm.errors import InputError

ROWS = [f"This is the text of row {i}, which says that {i} and {i + 1} are not the same." for i in range(40)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path, **columns):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.table(columns), path)
    return path


def everything(path):
    corpus = load_corpus(str(path))
    return [text for documents in corpus.splits.values() for text in documents()], corpus.left_out


def said(path):
    with pytest.raises(InputError) as caught:
        prepare(str(path), vocab_size=280)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Rows


@pytest.mark.parametrize("write", ["jsonl", "parquet"])
def test_a_column_called_text_wins_even_where_its_first_row_is_null_and_nulls_are_counted(tmp_path, write):
    texts = [None, *ROWS, None]
    names = [f"id {i}" for i in range(len(texts))]
    if write == "jsonl":
        path = jsonl(tmp_path / "rows.jsonl", [{"id": name, "text": text} for name, text in zip(names, texts, strict=True)])
    else:
        path = parquet(tmp_path / "rows.parquet", id=names, text=texts)
    found, left_out = everything(path)
    assert sorted(found) == sorted(ROWS)
    assert left_out.in_documents() == [f"2 documents without text (null): in rows.{write}"]
    corpus = prepare(str(path), vocab_size=280)
    assert corpus.left_out == prepare(str(path), vocab_size=280).left_out == tuple(left_out.in_documents())  # also from the cache
    assert "left out: 2 documents without text (null): in rows" in describe(corpus)


def test_a_column_that_may_hold_the_text_is_not_chosen_by_what_its_first_row_holds(tmp_path):
    assert "has the columns id, body" in said(jsonl(tmp_path / "a.jsonl", [{"id": "x", "body": None}, {"id": "y", "body": "text"}]))
    assert "line 2: the row has a field 'text'" in said(jsonl(tmp_path / "b.jsonl", [{"id": "x"}, {"id": "y", "text": "text"}]))
    assert "line 2: the row has no field 'body'" in said(jsonl(tmp_path / "c.jsonl", [{"body": "x"}, {"other": "y"}]))
    assert "has the columns id, body" in said(parquet(tmp_path / "d.parquet", id=["x", "y"], body=["a", "b"]))
    found, _ = everything(jsonl(tmp_path / "e.jsonl", [{"number": i, "body": row} for i, row in enumerate(ROWS)]))
    assert sorted(found) == sorted(ROWS)


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_every_parquet_column_of_strings_is_read(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    column = pa.array(ROWS).dictionary_encode() if kind == "dictionary" else pa.array(ROWS, type=getattr(pa, kind)())
    found, _ = everything(parquet(tmp_path / "rows.parquet", text=column))
    assert sorted(found) == sorted(ROWS)


def test_nested_columns_are_named_as_what_they_are(tmp_path):
    assert "column 'text' holds list<element: string>" in said(parquet(tmp_path / "list.parquet", text=[[row] for row in ROWS]))
    assert "column 'text' holds struct<body: string>" in said(parquet(tmp_path / "struct.parquet", text=[{"body": row} for row in ROWS]))
    assert "line 1: field 'text' holds no text but an object" in said(jsonl(tmp_path / "nested.jsonl", [{"text": {"body": row}} for row in ROWS]))


def test_text_that_utf_8_cannot_hold_is_named_with_its_line(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    assert "line 2: field 'text' holds half of a surrogate pair" in said(tmp_path / "half.jsonl")
    (tmp_path / "whole.jsonl").write_text('{"text": "\\ud83d\\ude42 fine, and more text than three parts need"}\n')
    assert "".join(everything(tmp_path / "whole.jsonl")[0]).startswith("🙂")
    pa = pytest.importorskip("pyarrow")
    invalid = pa.StringArray.from_buffers(1, pa.array([0, 2], type=pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe"))
    assert "not UTF-8" in said(parquet(tmp_path / "bytes.parquet", text=invalid))


def test_json_that_is_nested_deeply_or_holds_a_huge_number_is_no_traceback(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert "line 1" in said(tmp_path / "deep.jsonl")
    (tmp_path / "huge.jsonl").write_text('{"text": "a", "n": ' + "9" * 10_000 + "}\n")
    assert "line 1" in said(tmp_path / "huge.jsonl")


# Whole files


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_text(" ".join(ROWS), encoding=encoding)
    assert encoding[:6].upper() in said(tmp_path / "a.txt")


def test_a_mark_at_the_beginning_and_the_line_ends_of_windows_are_the_only_changes(tmp_path, monkeypatch):
    text = "".join(f"{row}\r\n\rünï\n" for row in ROWS)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in (4, 5, 7, 1 << 20):
        monkeypatch.setattr(text_files, "BYTES_AT_ONCE", size)
        assert list(text_files.read(tmp_path / "a.txt")) == [text.replace("\r\n", "\n")]
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 and")
    for size in (5, 1 << 20):
        monkeypatch.setattr(text_files, "BYTES_AT_ONCE", size)
        assert "not UTF-8 (byte 6)" in said(tmp_path / "bad.txt")


def test_the_end_of_text_in_a_text_ends_a_document(tmp_path, monkeypatch):
    text = END_OF_TEXT.join([*ROWS, ""])
    (tmp_path / "a.txt").write_text(text)
    for size in (3, 20, 1 << 20):
        monkeypatch.setattr(text_files, "BYTES_AT_ONCE", size)
        assert list(text_files.read(tmp_path / "a.txt")) == ROWS
    jsonl(tmp_path / "a.jsonl", [{"text": text}])
    assert list(text_files.read(tmp_path / "a.jsonl")) == ROWS
    corpus = prepare(str(tmp_path / "a.jsonl"), vocab_size=280)
    train = corpus.splits["train"]
    kept = [row for i, row in enumerate(ROWS) if i % 20 not in (10, 11)]
    assert corpus.tokenizer.decode(train.ids.tolist(), skip_special_tokens=False) == END_OF_TEXT.join([*kept, ""])
    assert train.documents == len(kept) and train.bytes == sum(map(len, kept))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.TXT.GZ", "a.txt.zst", "a.jsonl.zst"])
def test_packed_files_are_read_and_broken_ones_are_named(tmp_path, name):
    plain = "".join(json.dumps({"text": row}) + "\n" for row in ROWS) if "jsonl" in name else END_OF_TEXT.join(ROWS)
    if name.lower().endswith(".gz"):
        packed = gzip.compress(plain[:100].encode()) + gzip.compress(plain[100:].encode())
    else:
        zstandard = pytest.importorskip("zstandard")
        packed = zstandard.compress(plain[:100].encode()) + zstandard.compress(plain[100:].encode())
    (tmp_path / name).write_bytes(packed)
    found, left_out = everything(tmp_path / name)
    assert sorted(found) == sorted(ROWS) and not left_out.in_files()
    for broken in (packed[:-3], packed[: len(packed) // 2], b"\x1f\x8b", b"no packed file"):
        (tmp_path / name).write_bytes(broken)
        assert "is a broken " in said(tmp_path / name)


def test_a_long_line_is_cut_so_that_every_split_has_text(tmp_path):
    text = " ".join(ROWS * 20)
    (tmp_path / "a.txt").write_text(text)
    splits = {name: list(documents()) for name, documents in load_corpus(str(tmp_path / "a.txt")).splits.items()}
    assert all(splits.values()) and sum(len(part) for parts in splits.values() for part in parts) == len(text)
    (tmp_path / "b.txt").write_text("x" * 10_000)
    assert all("".join(documents()) for documents in load_corpus(str(tmp_path / "b.txt")).splits.values())


def test_neighbouring_blocks_of_one_text_stay_one_document(tmp_path):
    lines = [f"{row}\n" for row in ROWS * 50]
    (tmp_path / "a.txt").write_text("".join(lines))
    splits = {name: list(documents()) for name, documents in load_corpus(str(tmp_path / "a.txt")).splits.items()}
    assert len(splits["train"]) == len(splits["valid"]) + 1
    pieces = [
        piece for pair in zip(splits["train"], [*map("".join, zip(splits["valid"], splits["test"], strict=True)), ""], strict=True) for piece in pair
    ]
    assert "".join(pieces) == "".join(lines)


@pytest.mark.parametrize("space", ["\n", " "])
def test_a_very_long_text_is_read_in_parts_that_end_between_lines_or_words(tmp_path, monkeypatch, space):
    text = "".join(f"word{i}{space}" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("x" * 5000 + space + "y" * 10)
    monkeypatch.setattr(text_files, "PART_CHARACTERS", 1000)
    monkeypatch.setattr(text_files, "BYTES_AT_ONCE", 100)
    parts = list(text_files.read(tmp_path / "a.txt"))
    assert "".join(parts) == text and all(900 < len(part) < 1200 and part.endswith(space) for part in parts[:-1])
    assert list(text_files.read(tmp_path / "b.txt")) == ["x" * 5000 + space + "y" * 10]
    found, _ = everything(tmp_path / "a.txt")
    assert sorted("".join(found)) == sorted(text)


def test_each_twentieth_block_of_a_few_texts_is_for_validation(tmp_path):
    lines = [f"{i:04} " + "x" * 95 + "\n" for i in range(1200)]  # 60 blocks of two kilobytes
    for part in range(3):
        (tmp_path / f"{part}.txt").write_text("".join(lines[part * 400 : part * 400 + 400]))
    splits = {name: "".join(documents()) for name, documents in load_corpus(str(tmp_path)).splits.items()}
    places = {name: sorted({int(line[:4]) // 20 for line in text.splitlines()}) for name, text in splits.items()}
    assert places["valid"] == [10, 30, 50] and places["test"] == [11, 31, 51]
    assert sorted(place for part in places.values() for place in part) == list(range(60))


# Folders


def names(documents):
    return sorted(text.split()[0] for text in documents)


def write(folder, *files, size=10):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} " + "word " * size)


def test_one_file_among_others_does_not_become_the_folder_by_its_name(tmp_path):
    write(tmp_path, "faq.md", "index.md", "training.md", "install.md", "test.md", *(f"{i}.md" for i in range(20)))
    assert len(everything(tmp_path)[0]) == 25


def test_named_parts_are_used_and_the_other_files_are_named(tmp_path):
    write(tmp_path, "train.txt", "valid.txt", size=100)
    write(tmp_path, "README.md")
    found, left_out = everything(tmp_path)
    assert names(found) == ["train.txt", "valid.txt"]
    assert left_out.in_files() == ["1 file or folder in no split (the folder has a part called train): README.md"]


def test_no_document_is_lost_where_a_split_is_taken_from_train(tmp_path):
    for others in ((), ("test",), ("valid",)):
        folder = tmp_path / "-".join(["x", *others])
        write(folder, *(f"train/{i:02}.txt" for i in range(40)), *(f"{name}/a.txt" for name in others))
        found, _ = everything(folder)
        assert len(found) == 40 + len(others)


def test_a_folder_uses_what_it_can_and_names_the_rest(tmp_path, monkeypatch):
    write(tmp_path / "data", "a.txt", "b.TXT", "sub/c.md", "picture.png", "notes.docx", ".hidden/d.txt")
    (tmp_path / "data" / "e.txt.gz").write_bytes(gzip.compress(b"e.txt.gz text"))
    write(tmp_path / "elsewhere", "f.txt", "inner/g.txt")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "inner" / "up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "twice.txt").symlink_to(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "gone.txt").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "data" / "locked", "h.txt")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, left_out = everything(tmp_path / "data")
    assert {"a.txt", "b.TXT", "sub/c.md", "e.txt.gz", "f.txt", "inner/g.txt"} <= {word for text in found for word in text.split()}
    assert "h.txt" not in "".join(found)
    assert sorted(left_out.in_files()) == [
        "1 file or folder hidden: .hidden",
        "1 file or folder that lead to a file that is read already: twice.txt",
        "2 files and folders of a kind that is not read: notes.docx, picture.png",
        "2 files and folders that cannot be read: gone.txt, locked",
        "2 files and folders that lead back to a folder above them: self, up",
    ]


def test_paths_that_cannot_be_are_refused_in_one_line(tmp_path):
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    assert "no such file" in said(loop)
    assert "cannot be opened" in said(tmp_path / ("x" * 300 + ".txt"))
    assert "NUL" in said("a\0b.txt")
    assert "no such file" in said(tmp_path / "a.txt" / "b.txt")


def test_any_file_name_can_be_prepared_and_described(tmp_path):
    for name in (b"caf\xe9 \xff.txt", ("n" * 240 + ".txt").encode(), "日本\n*[a].txt".encode()):
        path = tmp_path / os.fsdecode(name)
        path.write_text(" ".join(ROWS))
        corpus = prepare(str(path), vocab_size=280)
        describe(corpus).encode()
        assert prepare(str(path), vocab_size=280).sha256 == corpus.sha256
        assert prepare(str(path), tokenizer=str(corpus.directory / "tokenizer.json")).directory == corpus.directory  # found again after training


def test_what_is_left_out_is_counted_once_however_often_it_is_read():
    left_out = LeftOut()
    for _ in range(3):
        left_out.file(Path("b.png"), "of a kind")
        left_out.documents(Path("a.jsonl"), "blank", 2)
        left_out.documents(Path("b.jsonl"), "blank", 0)
    assert left_out.in_files() == ["1 file or folder of a kind: b.png"] and left_out.in_documents() == ["2 documents blank: in a.jsonl"]


# The cache


def test_settings_stored_in_a_tokenizer_do_not_touch_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(ROWS))
    tokenizer = train_bpe(ROWS, 300)
    tokenizer.save(str(tmp_path / "plain.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "stored.json"))
    plain, stored = (prepare(str(tmp_path / "a.txt"), tokenizer=str(tmp_path / f"{name}.json")) for name in ("plain", "stored"))
    assert plain.splits["train"].ids.tolist() == stored.splits["train"].ids.tolist() and len(plain.splits["train"].ids) > 100


def test_one_split_can_be_prepared_alone(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": row} for row in ROWS])
    train_bpe(ROWS, 300).save(str(tmp_path / "own.json"))
    alone = prepare(str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "own.json"), only=("test",))
    whole = prepare(str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "own.json"))
    assert set(alone.splits) == {"test"} and set(whole.splits) == {"train", "valid", "test"}
    assert alone.splits["test"].ids.tolist() == whole.splits["test"].ids.tolist()


SCRIPT = """
import sys, time, logging
from gam_lm.data.tokens import prepare
logging.basicConfig(level=logging.INFO, format="%(message)s")
while time.time() < float(sys.argv[2]):
    pass
corpus = prepare(sys.argv[1], vocab_size=400)
print(corpus.sha256, corpus.tokenizer_sha256, len(corpus.splits["train"].ids), (corpus.directory / "meta.json").stat().st_ino)
"""


def test_parallel_preparations_of_one_corpus_give_one_result(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": row * 50} for row in ROWS])
    start = time.time() + 1.5  # all of them are ready by then, or the test is only easier
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.jsonl"), str(start)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), answers
    assert len({out for out, _ in answers}) == 1
    assert sum("training a byte-level tokenizer" in log for _, log in answers) == 1


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(ROWS))
    cache = tmp_path / "tokens"
    directory = prepare(str(tmp_path / "a.txt"), vocab_size=280, cache=cache).directory
    (directory / "meta.json").unlink()
    half = cache / f".{directory.name}.12345"
    half.mkdir()
    (half / "train.bin").write_bytes(b"half")
    again = prepare(str(tmp_path / "a.txt"), vocab_size=280, cache=cache)
    assert again.directory == directory and not half.exists()


def test_without_a_home_the_cache_folder_is_asked_for(monkeypatch):
    from gam_lm.data.places import cache_root

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        cache_root()
