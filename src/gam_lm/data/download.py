"""Downloads that are checked before they are kept."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from gam_lm.errors import InputError
from gam_lm.runtime.files import replacing

logger = logging.getLogger("gam_lm")

SECONDS = 60


def fetch(url: str, path: Path, sha256: str, what: str, clean: Callable[[bytes], bytes] = bytes) -> bytes:
    """Download ``url``, clean it, check it and keep it as ``path``.

    Args:
        url: where from.
        path: a file below the cache folder, written whole or not at all.
        sha256: of the cleaned bytes.
        what: the corpus, and which part of it, as the user knows it.
        clean: from the bytes that arrive to those that are kept.

    Returns:
        The cleaned bytes.

    Raises:
        InputError: where the download fails, or is another edition.
    """
    corpus = what.split(":")[0]
    logger.info("downloading %s from %s", what, url)
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            raw = clean(answer.read())
    except (urllib.error.URLError, OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        raise InputError(
            f"{what} cannot be downloaded from {url} ({error}): run `gam data prepare {corpus}` on a machine that is online and copy "
            f"its cache folder gam-lm/{corpus} here, or set GAM_DATA to the folder that holds {corpus}/"
        ) from error
    check(raw, sha256, what, url)
    with replacing(path) as temporary:
        temporary.write_bytes(raw)
    return raw


def check(raw: bytes, sha256: str, what: str, where: str) -> None:
    """Raise InputError where the checksum of ``raw``, found at ``where``, is not ``sha256``."""
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise InputError(f"{what}: {where} has the checksum {found[:12]}…, the index says {sha256[:12]}…: remove the file, or fetch that edition")
