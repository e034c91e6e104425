"""Files that are written whole or not at all, also where the machine stops in the middle."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gam_lm.errors import InputError

REASONS = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system takes",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an input/output error",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOENT: "it, or a folder above it, is not there",
    errno.ENXIO: "the device is not there",
    errno.ENODEV: "the device is not there",
    errno.ESTALE: "the network file system has lost it",
}

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.gam-part")
"""Names of what `replacing` has not finished."""


@contextmanager
def explained(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn the operating system's refusal to ``doing`` (write, read) ``path`` into an InputError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise cannot(path, REASONS[error.errno], doing) from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise cannot(path, "the name holds a null character", doing) from error


def cannot(path: Path, reason: str, doing: str = "write") -> InputError:
    """The error for a ``path`` that cannot be written or read."""
    return InputError(f"cannot {doing} {str(path)!r}: {reason}; choose another place{' or make room' if doing == 'write' else ''}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, a file or a folder, that takes its place when the block ends well and is removed when not.

    The content is on the disk before it gets its name. A killed process leaves at most the temporary path; the next one that writes ``path`` removes it.

    Raises InputError where the place cannot be written.
    """
    temporary = _beside(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writing(path):
            try:
                yield temporary
                _sync(temporary)
                if path.is_dir() and not path.is_symlink():
                    if not temporary.is_dir():  # a file never takes the place of a folder and of all that is in it
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
                    _replace_folder(path, temporary)
                else:
                    os.replace(temporary, path)
                _sync_names(path.parent)
            finally:
                remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path, start: str = ".") -> None:
    """Remove what killed processes left in ``folder`` of `replacing`, of names that begin with ``start``.

    Only the folder's owner may (see gam_lm.runtime.ownership), or whoever knows that nobody writes there now.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(start) and TEMPORARY.fullmatch(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Share the folder of ``path`` with others who write there. Where there are none, what killed ones left of ``path`` is removed first.

    The system takes the lock of a process that dies. Where there are no locks on folders (Windows, some network file systems) nothing is removed.
    """
    try:
        import fcntl

        handle = os.open(path.parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_leftovers(path.parent, _start(path))
            finally:
                fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _start(path: Path) -> str:
    """How temporary names of ``path`` begin. Long names are cut: a file system takes some 255 bytes."""
    return f".{path.name[:40]}."


def _beside(path: Path) -> Path:
    """A name that no other process has, whatever its id."""
    return path.with_name(f"{_start(path)}{secrets.token_hex(8)}.gam-part")


def _replace_folder(path: Path, new: Path) -> None:
    """Folders cannot be exchanged in one go: the old one steps aside and is only removed when the new one is there."""
    old = _beside(path)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, onto the disk."""
    if path.is_dir():
        for each in path.iterdir():
            _sync(each)
        _sync_names(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _sync_names(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such call
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync names by themselves and refuse the call
            raise
    finally:
        os.close(handle)
