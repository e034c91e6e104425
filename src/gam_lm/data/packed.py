"""Files packed with gzip or zstd, read as what is in them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from gam_lm.errors import InputError, MissingExtraError

PACKED = (".gz", ".zst")

BYTES_AT_ONCE = 1 << 17


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its name ends with .gz or .zst.

    Raises:
        InputError: where it cannot be opened, or is broken or cut short.
        MissingExtraError: for a .zst where zstandard is not installed.
    """
    packing = path.suffix.lower()
    failures: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    with ExitStack() as stack:
        if packing == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise MissingExtraError("zstandard", "data", f"data {str(path)!r}") from error
            failures = (zstandard.ZstdError, EOFError)
        try:
            file: Any = stack.enter_context(path.open("rb"))
            if packing == ".gz":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif packing == ".zst":
                file = stack.enter_context(io.BufferedReader(_Zstd(file)))
            yield cast(BinaryIO, file)
        except failures as error:
            raise InputError(f"data {str(path)!r} is a broken {packing} file ({error}): pack it again") from error
        except OSError as error:
            raise InputError(f"data {str(path)!r} cannot be read: {error.strerror or error}") from error


class _Zstd(io.RawIOBase):
    """The bytes in one or more zstd frames. The library's own reader takes the end of a file that was cut short for the end of the text."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._file.read(BYTES_AT_ONCE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it is cut short")
                return 0
            self._advance()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _advance(self) -> None:
        """Unpack what was read, up to the end of a frame."""
        import zstandard

        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        self._ready = self._frame.decompress(self._packed)
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
