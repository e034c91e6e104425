"""Training batches from a data set that is too large to prepare: tokenised while training goes on, resumed exactly, on any number of processes.

The data set is parquet files in the Hub's layout, in a folder or on the Hub. Its files, or where there are few of them its row groups, are dealt out to
lanes: lane i of L reads numbers i, i + L, … and no other, epoch after epoch. A batch takes its rows from the lanes in turn, so that the batch of a step is the
same whatever the number of processes, and a process reads only the lanes of its own rows. The order is that of the files, which the large data sets of the
Hub publish shuffled.

Shapes: B blocks, T tokens.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gam_lm.data import parquet
from gam_lm.data.blocks import Batch
from gam_lm.data.encoding import Encoded, EncodingPool
from gam_lm.data.shards import Shard
from gam_lm.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, vocabulary_size
from gam_lm.errors import InputError

LANES = 16
"""Of a run of no more processes: each holds a file open and a few documents."""

AHEAD = 4
"""Documents of a lane that are tokenised before they are asked for."""

Unit = tuple[Shard, int | None]
"""A file, or one of its row groups."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a lane stands: enough to go on with the very next token."""

    epoch: int = 0
    unit: int = 0
    """Of this lane's files or row groups."""
    row: int = 0
    """Of the unit: the document that the next token is in."""
    offset: int = 0
    """Tokens of that document that were used."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stream stands before a step. Plain numbers and strings, for a JSON file."""

    data: str
    """Fingerprint of the files, the tokenizer and the lanes."""
    step: int
    """Batches that were given."""
    lanes: Mapping[int, Place]
    """Of every lane, or of those that a process reads."""

    def to_json(self) -> dict[str, Any]:
        """The values, whose keys are strings."""
        return {"data": self.data, "step": self.step, "lanes": {str(lane): asdict(place) for lane, place in self.lanes.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of `to_json`. Raises InputError where it is broken."""
        try:
            lanes = {int(lane): Place(**place) for lane, place in values["lanes"].items()}
            return cls(data=values["data"], step=values["step"], lanes=lanes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the position in the stream is broken ({error}): remove the folder state to start over") from error


class StreamedBlocks:
    """Batches of blocks of T + 1 tokens that advance by T through the endless texts of the lanes, each document followed by ``<|endoftext|>``.

    Close it, or use it as a context manager, to end the processes that tokenise.

    Args:
        shards: files of the train split, as gam_lm.data.shards finds them.
        tokenizer: path of a tokenizer.json.
        context: T.
        batch_size: B, of all processes together.
        lanes: the same for the whole run; no more than there are files or row groups.
        rows: of each batch that this process needs, all where None.
        position: of every lane, where to go on; None starts at the beginning.
        processes: that tokenise in the background.

    Raises:
        InputError: for fewer row groups than lanes, or a position in other data.
    """

    def __init__(
        self, shards: list[Shard], tokenizer: Path, *, context: int, batch_size: int, lanes: int, rows: range | None = None,
        position: Position | None = None, processes: int = 1,
    ) -> None:  # fmt: skip
        self._context, self._batch_size, self._lanes = context, batch_size, lanes
        rows = range(batch_size) if rows is None else rows
        loaded = load_tokenizer(tokenizer)
        parts = ([(shard.name, shard.size) for shard in shards], fingerprint(loaded), lanes)
        data = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if position is not None and position.data != data:
            raise InputError("the data set is not what the run was trained on: files or tokenizer differ; use the same, or start a new run")
        end = loaded.token_to_id(END_OF_TEXT)
        dtype = "uint16" if vocabulary_size(loaded) <= 65_536 else "uint32"
        self._pool = EncodingPool(tokenizer, dtype, processes)
        dealt, own = units(shards, lanes), sorted({lane_of(row, batch_size, lanes) for row in rows})
        places = {} if position is None else position.lanes
        ends = np.asarray([] if end is None else [end], dtype=dtype)
        self._own = {lane: _Lane(dealt[lane::lanes], places.get(lane, Place()), self._pool, ends) for lane in own}
        self._position = Position(data=data, step=0 if position is None else position.step, lanes={lane: each.place for lane, each in self._own.items()})

    @property
    def position(self) -> Position:
        """Where the next batch begins, of the lanes that are read here."""
        return self._position

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step 0, 1, …, which are asked for in their order; rows of lanes that are not read here are zeros."""
        if step != self._position.step:
            raise ValueError(
                f"step is {step}, the stream stands at {self._position.step}: it goes forward only; make one at the position of that step"
            )
        tokens, targets = np.zeros((2, self._batch_size, self._context), np.int64)
        for lane, each in self._own.items():
            rows = [row for row in range(self._batch_size) if lane_of(row, self._batch_size, self._lanes) == lane]
            ids = each.take(len(rows) * self._context)
            tokens[rows], targets[rows] = ids[:-1].reshape(len(rows), -1), ids[1:].reshape(len(rows), -1)
        self._position = replace(self._position, step=step + 1, lanes={lane: each.place for lane, each in self._own.items()})
        return tokens, targets

    def close(self) -> None:
        """End the processes that tokenise."""
        self._pool.close()

    def __enter__(self) -> StreamedBlocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def lanes_for(shards: list[Shard], batch_size: int, processes: int) -> int:
    """How many lanes a run is to have that starts with so many processes: each process one at least, where the data set has as many row groups."""
    wanted = min(batch_size, max(LANES, processes))
    return wanted if len(shards) >= wanted else max(1, min(wanted, sum(parquet.row_groups(shard.path) for shard in shards)))


def lane_of(row: int, batch_size: int, lanes: int) -> int:
    """The lane that a row of a batch is taken from: neighbours share one, so that a process of many rows reads few."""
    return row * lanes // batch_size


def units(shards: list[Shard], lanes: int) -> list[Unit]:
    """What is dealt out to the lanes: files, or where they are too few their row groups. Raises InputError where these are too few as well."""
    if len(shards) >= lanes:
        return [(shard, None) for shard in shards]  # of many files not even the ends are read before their turn
    found: list[Unit] = [(shard, group) for shard in shards for group in range(parquet.row_groups(shard.path))]
    if len(found) < lanes:
        raise InputError(f"the data set has {len(found)} row groups for {lanes} lanes: write files with smaller row groups, or use fewer processes")
    return found


class _Lane:
    """One endless text: the documents of its units, over and over."""

    def __init__(self, own: list[Unit], place: Place, pool: EncodingPool, end: np.ndarray[Any, Any]) -> None:
        self._units, self._pool, self._end, self.place = own, pool, end, place
        self._texts = self._read(place)
        self._ahead: deque[tuple[Place, Future[Encoded]]] = deque()
        self._documents: deque[tuple[Place, np.ndarray[Any, Any]]] = deque()
        self._held = -place.offset

    def take(self, count: int) -> np.ndarray[Any, Any]:
        """The next ``count`` tokens and the one that follows, which stays."""
        while self._held < count + 1:
            while len(self._ahead) < AHEAD:
                place, text = next(self._texts)
                self._ahead.append((place, self._pool.submit(text)))
            place, encoded = self._ahead.popleft()
            ids = np.append(np.frombuffer(encoded.result().ids, dtype=self._end.dtype), self._end)
            self._documents.append((place, ids))
            self._held += len(ids)
        found = np.concatenate([ids for _, ids in self._documents])[self.place.offset :][: count + 1].astype(np.int64)
        self._held -= count
        offset = self.place.offset + count
        while offset >= len(self._documents[0][1]):
            offset -= len(self._documents.popleft()[1])
        self.place = replace(self._documents[0][0], offset=offset)
        return found

    def _read(self, start: Place) -> Iterator[tuple[Place, str]]:
        """Documents from a place on, each with its place."""
        epoch, some = start.epoch, False
        while True:
            for number in range(start.unit, len(self._units)):
                shard, group = self._units[number]
                first = start.row if number == start.unit else 0
                for row, text in enumerate(parquet.texts(shard.path, group)):
                    if row >= first and text is not None and text.strip():
                        some = True
                        yield Place(epoch=epoch, unit=number, row=row), text
            if not some and start.unit == start.row == 0:
                raise InputError(f"data {self._units[0][0].name!r} has no text in its row groups: use files with text in them")
            epoch, start = epoch + 1, Place()
