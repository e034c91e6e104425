"""The parquet files of a data set in the Hub's layout, in a folder or on the Hub itself; and the head of it that a run is planned with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gam_lm.data import parquet
from gam_lm.data.corpora import Corpus
from gam_lm.data.folders import SPLIT_NAMES, find, names_split
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


def data_set(data: str) -> DataSet:
    """The files of a folder, or of a data set of the Hub by its name.

    Raises:
        InputError: where there are no parquet files to train on, or the Hub cannot be reached.
        MissingExtraError: for a data set of the Hub where ``datasets`` is not installed.
    """
    path = Path(data).expanduser()
    if path.exists():
        files = [file for file in find(path) if kind(file) == ".parquet"]
        if not files:
            raise InputError(f"data is {data!r}: only parquet files can be streamed, and there is none; leave out --stream to prepare the text")
        named = {
            split: [file for file in files if names_split(file, names) or file.parent.name in names] for split, names in SPLIT_NAMES.items()
        }
        train = named["train"] or ([] if any(named.values()) else files)
        found = {"train": train, "valid": named["valid"]}
        parts = {split: [Shard(str(file), file.name, file.stat().st_size) for file in several] for split, several in found.items()}
    else:
        parts = _on_the_hub(data)
    if not parts["train"]:
        raise InputError(f"data {data!r} has files of other splits and none of train: name a folder with train-*.parquet")
    return DataSet(parts["train"], parts["valid"])


def with_validation(found: DataSet) -> tuple[DataSet, Corpus]:
    """The data set without what is kept for validation, and its head: a few documents of the train split, and the validation split.

    Where it has no validation split, the last file is kept for it; of a single file nothing can be.

    Raises:
        InputError: for a single file without a validation split.
    """
    train, valid = found
    if not valid:
        if len(train) < 2:
            raise InputError(f"data has the single file {train[0].name!r} and no validation split: add a file validation-*.parquet beside it")
        train, valid = train[:-1], train[-1:]
    stamp = repr([*train, "valid", *valid, HEAD_ROWS, VALID_ROWS])
    splits = {"train": lambda: islice(_texts(train), HEAD_ROWS), "valid": lambda: islice(_texts(valid), VALID_ROWS)}
    return DataSet(train, valid), Corpus(f"head-of-{Path(train[0].path).parent.name or 'data'}", splits, stamp)


def _texts(shards: list[Shard]) -> Iterator[str]:
    return (text for shard in shards for text in parquet.texts(shard.path) if text is not None and text.strip())


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
