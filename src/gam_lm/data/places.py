"""Where text is kept: the user's corpora and our cache."""

from __future__ import annotations

import os
from pathlib import Path

from gam_lm.errors import InputError


def cache_root() -> Path:
    """Where prepared and downloaded things live: $XDG_CACHE_HOME/gam-lm, by default ~/.cache/gam-lm. Raises InputError where there is no home."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "gam-lm"
    try:
        return Path.home() / ".cache" / "gam-lm"
    except RuntimeError as error:
        raise InputError("there is no home folder to keep prepared text in: set XDG_CACHE_HOME to a folder that can be written") from error


def data_root() -> Path | None:
    """Where the user keeps named corpora: $GAM_DATA."""
    value = os.environ.get("GAM_DATA")
    return Path(value) if value else None
