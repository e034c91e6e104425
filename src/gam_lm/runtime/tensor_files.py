"""A safetensors file, written like every other file of the library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gam_lm.runtime.files import REASONS, cannot, explained


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, shown: Path | None = None, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of ``tensors`` that share no memory, with ``metadata`` (by default the word that other libraries look for).

    Raises InputError where that cannot be, which calls the file ``shown`` where ``path`` is temporary.
    """
    with explained(shown or path):
        path.touch()
        mode = path.stat().st_mode  # as every other file gets it, where safetensors takes the strictest
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"} if metadata is None else dict(metadata))
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            reason = REASONS.get(int(code[1]), str(error)) if code else str(error)
            raise cannot(shown or path, reason) from error
        path.chmod(mode)
