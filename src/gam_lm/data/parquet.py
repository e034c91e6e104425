"""Rows of parquet files, and the column that holds the text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from gam_lm.data.left_out import printable
from gam_lm.errors import InputError, MissingExtraError

ROWS_AT_ONCE = 64
"""Few, since a row may be a whole book."""


def rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """The values of ``columns``, row by row, in bounded memory.

    Raises:
        InputError: where the file is broken or a column is missing.
        MissingExtraError: where pyarrow is not installed.
    """
    with _opened(path) as file:
        names = set(file.schema_arrow.names)
        for column in columns:
            if column not in names:
                raise InputError(f"data {str(path)!r} has no column {column!r}: its columns are {', '.join(sorted(names))}")
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
            yield from zip(*(batch.column(batch.schema.get_field_index(column)).to_pylist() for column in columns), strict=True)


def row_groups(path: Path | str) -> int:
    """How many row groups a file has, from its footer alone. Raises as `texts` does."""
    with _opened(path) as file:
        return int(file.num_row_groups)


def text_bytes(path: Path | str) -> int:
    """About how many bytes of text a file holds unpacked, from its footer alone. Raises as `texts` does."""
    with _opened(path) as file:
        column = _text_column(path, {field.name: field.type for field in file.schema_arrow})
        parts = (file.metadata.row_group(i).column(j) for i in range(file.num_row_groups) for j in range(file.metadata.num_columns))
        return sum(int(part.total_uncompressed_size) for part in parts if part.path_in_schema == column)


def texts(path: Path | str, row_group: int | None = None) -> Iterator[str | None]:
    """The texts of a file or of one of its row groups, one a row; None where a row has none. A file may be elsewhere: hf://…, as fsspec opens it.

    Raises:
        InputError: where the file is broken, or no column is known to hold the text.
        MissingExtraError: where pyarrow is not installed.
    """
    with _opened(path) as file:
        column = _text_column(path, {field.name: field.type for field in file.schema_arrow})
        groups = None if row_group is None else [row_group]
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column], row_groups=groups):
            yield from batch.column(0).to_pylist()


def _text_column(path: Path | str, kinds: dict[str, Any]) -> str:
    """The column called text, else the only one of strings."""
    strings = [name for name, kind in kinds.items() if _holds_text(kind)]
    if "text" in strings:
        return "text"
    if "text" in kinds:
        raise InputError(f"data {str(path)!r}: column 'text' holds {' '.join(str(kinds['text']).split())}: write a column of plain strings")
    if len(strings) != 1:
        raise InputError(f"data {str(path)!r} has the columns {', '.join(map(printable, kinds)) or '(none)'}: call the one with the text 'text'")
    return strings[0]


def _holds_text(kind: Any) -> bool:
    """Whether a column of an Arrow type is read as text; a column of nulls alone may be."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null))


def _source(path: Path | str) -> AbstractContextManager[Any]:
    if "://" not in str(path):
        import pyarrow as pa

        return pa.OSFile(os.fsencode(path))  # as bytes: a name may be no UTF-8
    import fsspec

    return fsspec.open(str(path), "rb")


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"data {str(path)!r}") from error
    try:
        with _source(path) as source, pq.ParquetFile(source) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"data {str(path)!r} holds text that is not UTF-8: write the file again from UTF-8 text") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data {str(path)!r} is a broken parquet file ({' '.join(str(error).split())[:120]}): copy it again") from error
