"""The losses by block of a row, in a file beside results.json, for paired comparisons. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from gam_lm.errors import InputError
from gam_lm.runtime.files import replacing

Row = Mapping[str, Any]


def write_blocks(
    directory: Path, label: str, nats: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any], documents: np.ndarray[Any, Any] | None = None
) -> str:
    """Keep the loss of every block of a split beside results.json, for paired comparisons.

    Args:
        directory: of results.json.
        label: of the row and its split.
        nats: sum of the loss over each block (blocks,).
        tokens: predicted tokens of each block (blocks,).
        documents: the document of each block, as gam_lm.data.blocks.document_of_blocks numbers them, below 2²⁴; None where it is not known.

    Returns:
        The file's name within ``directory``, for the row's ``val_blocks`` or ``test_blocks``.
    """
    name = f"blocks/{label}.npy"
    lines = [nats, tokens] if documents is None else [nats, tokens, documents]
    with replacing(directory / name) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(lines).astype(np.float32), allow_pickle=False)
    return name


def measured_on(row: Row, split: str) -> Row:
    """What a row has of a split (val, test) or of a further text: ``nats_per_token``, ``blocks``; of a text also its ``sha256`` and ``bits_per_byte``."""
    names = {"nats_per_token": f"{split}_nats_per_token", "blocks": f"{split}_blocks"}
    own = {key: row[name] for key, name in names.items() if name in row}
    further: Row = row.get("texts", {}).get(split, {})
    return own or further


def read_blocks(directory: Path, row: Row, split: str = "val") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The loss and the predicted tokens of every block of a row's split (val, test) or further text. Raises InputError where they are missing."""
    nats, tokens = _blocks(directory, row, split)[:2]
    return nats, tokens


def read_documents(directory: Path, row: Row, split: str = "val") -> np.ndarray[Any, Any] | None:
    """The document of every block, int64 (blocks,); None in files that do not tell. Raises InputError where the file is missing."""
    lines = _blocks(directory, row, split)
    return lines[2].astype(np.int64) if len(lines) > 2 else None


def _blocks(directory: Path, row: Row, split: str) -> np.ndarray[Any, Any]:
    path = directory / str(measured_on(row, split).get("blocks"))
    missing = f"{path}: the losses by block of {row.get('model')} are not there, copy the folder blocks/ with its results.json"
    try:
        with path.open("rb") as file:  # the path alone could name an archive
            lines: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
            whole = not file.read(1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(missing) from error
    except (ValueError, OSError, EOFError, MemoryError, TypeError, SyntaxError, TokenError) as error:  # numpy reads a header as a literal
        raise InputError(f"{path} is broken ({str(error).splitlines()[0][:100] if str(error) else type(error).__name__}): copy it again") from error
    fits = lines.dtype == np.float32 and lines.ndim == 2 and lines.shape[0] in (2, 3) and lines.shape[1] > 0
    if not (whole and fits and np.isfinite(lines[:2]).all() and (lines[1:] >= 0).all() and lines[1].sum() > 0 and (lines[2:] < 2**24).all()):
        raise InputError(f"{path} is broken (it holds no losses and tokens by block): copy it again")
    return lines
