"""Rows of parquet files, and the column that holds the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"data {str(path)!r}") from error
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"data {str(path)!r} holds text that is not UTF-8: write the file again from UTF-8 text") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data {str(path)!r} is a broken parquet file ({' '.join(str(error).split())[:120]}): copy it again") from error
