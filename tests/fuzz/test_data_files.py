"""Any file at all: its text comes back from the ids exactly, or one line says why it cannot be used.

FUZZ_EXAMPLES=100000 tries so many of each kind.
"""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from data_inputs import documents_of, documents_of_file, is_unicode, outcome, rows, unicode_texts, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gam_lm.data.folders import find, splits
from gam_lm.data.left_out import LeftOut
from gam_lm.data.text_files import read

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 150))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

@fuzz
@given(text=unicode_texts)
def test_text_comes_back(text):
    usable = outcome("train.txt", text.encode(), documents_of_file(text))
    assert usable == ("\0" not in text)


@fuzz
@given(
    raw=st.binary(max_size=200) | st.tuples(unicode_texts, st.binary(max_size=4), unicode_texts).map(lambda t: t[0].encode() + t[1] + t[2].encode())
)
def test_any_bytes_are_text_or_refused(raw):
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError:
        text = None
    usable = outcome("train.txt", raw, None if text is None else documents_of(text))
    assert usable == (text is not None and b"\0" not in raw)


@fuzz
@given(rows=rows, escaped=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_rows_come_back(rows, escaped, end):
    raw = "".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows).encode("utf-8", "surrogatepass")
    expected = [document for row in rows if row["text"] is not None and is_unicode(row["text"]) for document in documents_of(row["text"])]
    usable = outcome("train.jsonl", raw, expected if all(is_unicode(row["text"]) for row in rows) else None)
    if escaped:
        assert usable == all(is_unicode(row["text"]) for row in rows)


@fuzz
@given(lines=st.lists(values.map(json.dumps) | st.text(max_size=20), max_size=6))
def test_any_lines_are_rows_or_refused(lines):
    outcome("train.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass"), None)


@fuzz
@given(text=unicode_texts, cut=st.integers(0, 60) | st.none(), flip=st.tuples(st.integers(0, 1000), st.integers(1, 255)) | st.none())
def test_packed_text_comes_back_or_is_refused(text, cut, flip):
    text = text.replace("\0", "") + "text that is long enough to be packed"
    raw = bytearray(gzip.compress(text.encode(), mtime=0))
    if flip is not None:
        raw[flip[0] % len(raw)] ^= flip[1]
    if cut is not None:
        raw = raw[: len(raw) - cut]
    whole = documents_of_file(text)
    usable = outcome("train.txt.gz", bytes(raw), whole if raw else [])
    if flip is None and not cut:
        assert usable


@fuzz
@given(
    rows=st.lists(unicode_texts | st.none(), max_size=30),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=3),
    cut=st.integers(0, 50),
)
def test_parquet_comes_back_or_is_refused(rows, damage, cut):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(rows))), "text": pa.array(rows, type=pa.string())}), buffer)
    raw = bytearray(buffer.getvalue().to_pybytes())
    for place, value in damage:
        raw[place % len(raw)] ^= value
    raw = raw[: len(raw) - cut]
    whole = not damage and not cut
    usable = outcome("train.parquet", bytes(raw), [document for row in rows if row for document in documents_of(row)] if whole else None)
    assert usable or not whole


@fuzz
@given(texts=st.lists(unicode_texts.map(lambda text: text.replace("\0", "")), min_size=1, max_size=30))
def test_no_text_is_lost_between_the_splits(texts):
    with tempfile.TemporaryDirectory() as place:
        for i, text in enumerate(texts):
            Path(place, f"{i:02}.txt").write_bytes(text.encode())
        parts = splits(Path(place))
        found = [document for documents in parts.values() for document in documents()]
        expected = [d for text in texts for d in documents_of_file(text)]
        assert sorted("".join(found)) == sorted("".join(expected))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
def test_a_parquet_file_in_a_folder_whose_name_is_no_utf8_is_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "\udcff" / "a.parquet"
    path.parent.mkdir()
    with path.open("wb") as file:
        pq.write_table(pa.table({"text": ["one", None, "two"]}), file)
    assert list(read(path)) == ["one", "two"]


def test_files_of_one_name_in_two_folders_are_counted_as_two(tmp_path):
    (tmp_path / "a.txt").write_text("some text that is read")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scan.pdf").write_bytes(b"")
    left_out = LeftOut()
    find(tmp_path, left_out)
    find(tmp_path, left_out)  # counts nothing twice
    assert left_out.in_files() == ["2 files and folders of a kind that is not read: scan.pdf"]
