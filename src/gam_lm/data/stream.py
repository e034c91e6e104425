"""Training batches from a data set that is too large to prepare: tokenised while training goes on, resumed exactly.

The data set is a folder of parquet files in the Hub's layout. Its row groups, in the order of the files' names, are dealt out to the ranks
of a distributed run: rank r of R reads row groups r, r + R, … and no other, epoch after epoch. The order is that of the files, which the large data sets
of the Hub publish shuffled.

Shapes: B blocks, T tokens.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gam_lm.data import parquet
from gam_lm.data.blocks import Batch
from gam_lm.data.encoding import encode_in_processes
from gam_lm.data.folders import SPLIT_NAMES, find, names_split
from gam_lm.data.text_files import kind
from gam_lm.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, vocabulary_size
from gam_lm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream stands: enough to go on with the very next token. Plain numbers and strings, for a JSON file."""

    data: str
    """Fingerprint of the files, the tokenizer and the share of the ranks."""
    epoch: int = 0
    group: int = 0
    """Of this rank's row groups."""
    row: int = 0
    """Of the row group: the document that the next token is in."""
    offset: int = 0
    """Tokens of that document that were used."""
    step: int = 0
    """Batches that were given."""


@dataclass
class _Document:
    position: StreamPosition
    ids: np.ndarray[Any, Any]


class StreamedBlocks:
    """Batches of blocks of T + 1 tokens that advance by T through one endless text, each document followed by ``<|endoftext|>``.

    Close it, or use it as a context manager, to end the processes that tokenise.

    Args:
        folder: parquet files with a column called text, as the Hub serves them; where file names say so, those of the train split.
        tokenizer: path of a tokenizer.json.
        context: T.
        batch_size: B, of this rank.
        position: where to go on; None starts at the beginning.
        rank: of this process.
        ranks: of the whole run.
        processes: that tokenise in the background.

    Raises:
        InputError: for a folder without parquet files or text, fewer row groups than ranks, or a position in other data.
    """

    def __init__(
        self, folder: Path, tokenizer: Path, *, context: int, batch_size: int, position: StreamPosition | None = None, rank: int = 0, ranks: int = 1,
        processes: int = 1,
    ) -> None:  # fmt: skip
        self._context, self._batch_size = context, batch_size
        files = shards(folder)
        groups = [(file, group) for file in files for group in range(parquet.row_groups(file))]
        if len(groups) < ranks:
            raise InputError(
                f"data {str(folder)!r} has {len(groups)} row groups for {ranks} ranks: write files with smaller row groups, or use fewer ranks"
            )
        self._folder, self._groups = folder, groups[rank::ranks]
        loaded = load_tokenizer(tokenizer)
        parts = ([(file.name, file.stat().st_size) for file in files], fingerprint(loaded), rank, ranks)
        data = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if position is not None and position.data != data:
            raise InputError(
                f"data {str(folder)!r} is not what the run was trained on: files, tokenizer or number of ranks differ; use the same, or start a new run"
            )
        self._position = position or StreamPosition(data=data)
        end = loaded.token_to_id(END_OF_TEXT)
        self._end = [] if end is None else [end]
        self._dtype = "uint16" if vocabulary_size(loaded) <= 65_536 else "uint32"
        self._waiting: deque[StreamPosition] = deque()  # of the texts that are being tokenised
        self._documents: deque[_Document] = deque()  # that are not used up
        self._held = -self._position.offset  # tokens of these documents that are not used
        self._encoded = encode_in_processes(self._texts(), tokenizer, self._dtype, processes)

    @property
    def position(self) -> StreamPosition:
        """Where the next batch begins."""
        return self._position

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step 0, 1, …, which are asked for in their order."""
        if step != self._position.step:
            raise ValueError(
                f"step is {step}, the stream stands at {self._position.step}: it goes forward only; make one at the position of that step"
            )
        used = self._batch_size * self._context
        while self._held < used + 1:
            self._read()
        tokens = np.concatenate([document.ids for document in self._documents])[self._position.offset :][: used + 1].astype(np.int64)
        self._advance(used)
        shape = (self._batch_size, self._context)
        return tokens[:-1].reshape(shape), tokens[1:].reshape(shape)

    def close(self) -> None:
        """End the processes that tokenise."""
        self._encoded.close()  # type: ignore[attr-defined]

    def __enter__(self) -> StreamedBlocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self) -> None:
        """Append the next document."""
        encoded = next(self._encoded)
        ids = np.append(np.frombuffer(encoded.ids, dtype=self._dtype), np.asarray(self._end, dtype=self._dtype))
        self._documents.append(_Document(self._waiting.popleft(), ids))
        self._held += len(ids)

    def _advance(self, count: int) -> None:
        """Use ``count`` tokens."""
        self._held -= count
        offset = self._position.offset + count
        while offset >= len(self._documents[0].ids):
            offset -= len(self._documents.popleft().ids)
        self._position = replace(self._documents[0].position, offset=offset, step=self._position.step + 1)

    def _texts(self) -> Iterator[str]:
        """Documents from the position on, over and over; where each is goes to ``_waiting``."""
        start = self._position
        epoch, some = start.epoch, False
        while True:
            for group in range(start.group, len(self._groups)):
                first = start.row if group == start.group else 0
                for row, text in enumerate(parquet.texts(*self._groups[group])):
                    if row >= first and text is not None and text.strip():
                        some = True
                        self._waiting.append(StreamPosition(data=start.data, epoch=epoch, group=group, row=row))
                        yield text
            if not some and start.group == start.row == 0:
                raise InputError(f"data {str(self._folder)!r} has no text in the row groups of this rank: use files with text in them")
            epoch, start = epoch + 1, StreamPosition(data=start.data)


def shards(folder: Path) -> list[Path]:
    """The parquet files of a data set in the Hub's layout: those of the train split where their names or folders say so, else all. InputError where there is none."""
    files = [file for file in find(folder) if kind(file) == ".parquet"]
    if not files:
        raise InputError(f"data is {str(folder)!r}: only parquet files can be streamed, and there is none; leave out --stream to prepare the text")
    train = [file for file in files if names_split(file, SPLIT_NAMES["train"]) or file.parent.name in SPLIT_NAMES["train"]]
    others = [file for names in SPLIT_NAMES.values() for file in files if names_split(file, names) or file.parent.name in names]
    return train or ([] if others else files) or _no_train(folder)


def _no_train(folder: Path) -> list[Path]:
    raise InputError(f"data {str(folder)!r} has files of other splits and none of train: name a folder with train-*.parquet")


def to_json(position: StreamPosition) -> dict[str, Any]:
    """The values of a position."""
    return asdict(position)
