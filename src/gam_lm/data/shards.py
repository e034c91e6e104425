"""The parquet files of a data set in the Hub's layout, in a folder or on the Hub itself; and the head of it that a run is planned with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gam_lm.data import parquet
from gam_lm.data.corpora import Corpus
from gam_lm.data.folders import files_by_split, find
from gam_lm.data.left_out import BLANK, NO_SPLIT, NULL, OTHER_KIND, LeftOut
from gam_lm.data.text_files import kind
from gam_lm.errors import InputError, MissingExtraError

HEAD_ROWS = 2000
"""Documents of the head: what the tokenizer is trained on and the steps are timed with."""

VALID_ROWS = 500
"""Documents of the validation split, at most."""


class Shard(NamedTuple):
    """A parquet file."""

    path: str
    """A path of this machine, or an address such as hf://datasets/…"""
    name: str
    size: int
    """Bytes."""


class DataSet(NamedTuple):
    """A data set to be streamed."""

    train: list[Shard]
    valid: list[Shard]
    """Empty where it has no validation split."""
    left_out: LeftOut
    """Files that are in no split or cannot be streamed; documents of the head are counted as they are read."""


def data_set(data: str) -> DataSet:
    """The files of a folder, or of a data set of the Hub by its name.

    Raises:
        InputError: where there are no parquet files to train on, or the Hub cannot be reached.
        MissingExtraError: for a data set of the Hub where ``datasets`` is not installed.
    """
    path, left_out = Path(data).expanduser(), LeftOut()
    if path.exists():
        there = find(path, left_out)
        files = [file for file in there if kind(file) == ".parquet"]
        if not files:
            raise InputError(f"data is {data!r}: only parquet files can be streamed, and there is none; leave out --stream to prepare the text")
        named = files_by_split(path if path.is_dir() else path.parent, files) or {"train": files}
        for file in there:
            if not any(file in part for part in named.values()):
                left_out.file(file, NO_SPLIT if file in files else OTHER_KIND)
        parts = {split: [Shard(str(file), file.name, file.stat().st_size) for file in named.get(split, ())] for split in ("train", "valid")}
    else:
        parts = _on_the_hub(data)
    if not parts["train"]:
        raise InputError(f"data {data!r} has files of other splits and none of train: name a folder with train-*.parquet")
    return DataSet(parts["train"], parts["valid"], left_out)


def text_bytes(shards: Sequence[Shard]) -> int:
    """About how many bytes of text the files hold: they are packed as the first of them is. Raises InputError where that is broken."""
    return round(sum(shard.size for shard in shards) * parquet.text_bytes(shards[0].path) / max(1, shards[0].size))


def with_validation(found: DataSet) -> tuple[DataSet, Corpus]:
    """The data set without what is kept for validation, and its head: a few documents of the train split, and the validation split.

    Where it has no validation split, the last file is kept for it; of a single file nothing can be.

    Raises:
        InputError: for a single file without a validation split.
    """
    train, valid, left_out = found
    if not valid:
        if len(train) < 2:
            raise InputError(f"data has the single file {train[0].name!r} and no validation split: add a file validation-*.parquet beside it")
        train, valid = train[:-1], train[-1:]
    stamp = repr([*train, "valid", *valid, HEAD_ROWS, VALID_ROWS])
    splits = {"train": lambda: islice(_texts(train, left_out), HEAD_ROWS), "valid": lambda: islice(_texts(valid, left_out), VALID_ROWS)}
    name = f"head-of-{Path(train[0].path).parent.name or 'data'}"
    return DataSet(train, valid, left_out), Corpus(name, splits, stamp, left_out=left_out)


def _texts(shards: list[Shard], left_out: LeftOut) -> Iterator[str]:
    for shard in shards:
        nulls = blanks = 0
        for text in parquet.texts(shard.path):
            if text is None:
                nulls += 1
                left_out.documents(Path(shard.name), NULL, nulls)  # at once: nobody reads a file to its end here
            elif not text.strip():
                blanks += 1
                left_out.documents(Path(shard.name), BLANK, blanks)
            else:
                yield text


def _on_the_hub(data: str) -> dict[str, list[Shard]]:
    """The files of a data set's splits, as ``datasets`` finds them: ``name`` or ``name:configuration``."""
    try:
        import datasets
        import fsspec
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"data {data!r}") from error
    name, _, configuration = data.partition(":")
    try:
        files: dict[str, Any] = datasets.load_dataset_builder(name, configuration or None).config.data_files or {}
        found: dict[str, list[Shard]] = {}
        for split, theirs in (("train", "train"), ("valid", "validation")):
            addresses = [str(each) for each in files.get(theirs, ()) if str(each).endswith(".parquet")]
            system = fsspec.core.url_to_fs(addresses[0])[0] if addresses else None
            found[split] = [Shard(each, each.rpartition("/")[2], int(system.info(each)["size"])) for each in addresses] if system is not None else []
    except (ConnectionError, OSError, ValueError) as error:
        raise InputError(
            f"data is {data!r}, which is no folder here, and the Hub cannot be reached for it ({str(error).splitlines()[0][:120]}): "
            "name a folder of parquet files, or a data set of the Hub while online"
        ) from error
    return found
