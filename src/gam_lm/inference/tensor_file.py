"""Tensors and a header in one safetensors file: what a saved context, a saved cache and an initial memory have in common.

The header is a pydantic model, as JSON in the file's metadata under ``gam_lm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.runtime.files import replacing
from gam_lm.runtime.tensor_files import save_tensors

H = TypeVar("H", bound=BaseModel)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: BaseModel) -> None:
    """Write a file, whole or not at all. Raises InputError where the place cannot be written."""
    # Copies: states share memory (a start of zeros, a ring and its present), which the format does not know.
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_tensors(temporary, own, shown=path, metadata={"gam_lm": header.model_dump_json()})


def read_tensors(path: Path, kind: type[H], *, missing: str, broken: str, again: str) -> tuple[H, dict[str, Tensor]]:
    """The header and the tensors of a file, in main memory.

    Args:
        path: as `write_tensors` wrote it.
        kind: of the header.
        missing: the error where there is no such file.
        broken: begins the error where it is no such file, before the reason.
        again: ends that error: what to do.

    Raises:
        InputError: where the file is missing, broken, or has another header.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = kind.model_validate_json((file.metadata() or {}).get("gam_lm", ""))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except FileNotFoundError as error:
        raise InputError(missing) from error
    except ValidationError as error:
        raise InputError(f"{broken} (its header does not fit: {error.errors()[0]['msg']}): {again}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{broken} ({error}): {again}") from error
