"""Text to token ids, quickly: every different word is encoded once, on all cores.

A text is cut before each white space that follows something else (`gam_lm.data.pieces`). Such words repeat, so their ids come from a
table. What is not in the table, and every text of a tokenizer whose texts may not be cut, goes through the tokenizer itself.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from gam_lm.data.pieces import may_be_cut
from gam_lm.errors import InputError

WORD = re.compile(r"\s*\S+|\s+")
ODD_SPACE = re.compile(r"[\x1c-\x1f]")
"""White space for Python but not for the tokenizers: a text with one is not cut."""

TABLE_ENTRIES = 400_000
TABLE_CHARACTERS = 40
"""Longer words seldom repeat."""

ALONE_CHARACTERS = 16_000_000
"""So much text is encoded before other processes are started: they take longer to start than small texts take."""

MOST_PROCESSES = 16
HEADER = struct.Struct("<QQ")


class Encoded(NamedTuple):
    """A piece of text as ids."""

    ids: bytes
    """Of the tokenizer's ids, in the data type that was asked for."""
    words: int
    """White-space separated words."""


class Encoder:
    """Encodes texts with one tokenizer, without special tokens around them.

    Args:
        tokenizer: any.
        dtype: of the ids, "uint16" or "uint32".
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        self._tokenizer, self.dtype = tokenizer, dtype
        self.cuts = may_be_cut(tokenizer)
        self._table = _Table(self)

    def __call__(self, text: str) -> Encoded:
        """The ids and the number of words of ``text``."""
        if not self.cuts or ODD_SPACE.search(text):
            return Encoded(self.whole(text), len(text.split()))
        words = WORD.findall(text)
        return Encoded(b"".join(map(self._table.__getitem__, words)), len(words) - bool(words and words[-1].isspace()))

    def whole(self, text: str) -> bytes:
        """The ids of ``text`` from the tokenizer itself."""
        [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=self.dtype).tobytes()


class _Table(dict[str, bytes]):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = encoder

    def __missing__(self, word: str) -> bytes:
        ids = self._encoder.whole(word)
        if len(self) < TABLE_ENTRIES and len(word) <= TABLE_CHARACTERS:
            self[word] = ids
        return ids


def encode_all(texts: Iterable[str], encoder: Encoder, tokenizer_file: Path) -> Iterator[Encoded]:
    """Encode ``texts`` in their order: the first here, and where there are many more, the others on all cores.

    Args:
        texts: pieces; a few for each core are held at a time.
        encoder: of the tokenizer in ``tokenizer_file``.
        tokenizer_file: what the other processes read.

    Raises:
        InputError: where one of the other processes is killed.
    """
    texts = iter(texts)
    characters = 0
    for text in texts:
        yield encoder(text)
        characters += len(text)
        if characters >= ALONE_CHARACTERS:
            break
    cores = min(MOST_PROCESSES, _cores())
    if cores == 1:
        yield from map(encoder, texts)
    else:
        yield from encode_in_processes(texts, tokenizer_file, encoder.dtype, cores)


def encode_in_processes(texts: Iterable[str], tokenizer_file: Path, dtype: str, cores: int) -> Iterator[Encoded]:
    """Encode ``texts`` in their order in ``cores`` other processes, which are a few texts ahead of whoever asks.

    Raises:
        InputError: where one of the processes is killed.
    """
    waiting: deque[Future[Encoded]] = deque()
    pool = EncodingPool(tokenizer_file, dtype, cores)
    try:
        for text in texts:
            waiting.append(pool.submit(text))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.close()


class EncodingPool:
    """Other processes that encode texts with one tokenizer. Close it to end them.

    Args:
        tokenizer_file: what the processes read.
        dtype: of the ids, "uint16" or "uint32".
        cores: how many processes there are; each is started when the first text for it comes.
    """

    def __init__(self, tokenizer_file: Path, dtype: str, cores: int) -> None:
        self._tokenizer_file, self._dtype = tokenizer_file, dtype
        # As many threads as processes: each thread waits for one process at a time.
        self._idle: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        for _ in range(cores):
            self._idle.put(None)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(cores)

    def submit(self, text: str) -> Future[Encoded]:
        """The ids of ``text``, later. The result raises InputError where a process is killed."""
        return self._threads.submit(self._encode, text)

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.communicate()  # closes its input, which ends it

    def _encode(self, text: str) -> Encoded:
        process = self._idle.get()
        try:
            if process is None:
                process = _start(self._tokenizer_file, self._dtype)
                self._processes.append(process)
            assert process.stdin is not None and process.stdout is not None
            _send(process.stdin, text.encode(), 0)
            ids, words = _receive(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise InputError("a process that encodes text was killed: free some memory and run the command again") from error
        finally:
            self._idle.put(process)
        return Encoded(ids, words)


def _start(tokenizer_file: Path, dtype: str) -> subprocess.Popen[bytes]:
    """A process that runs `_serve`. In a session of its own: Ctrl-C is for the process that the user sees."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "gam_lm.data.encoding", str(tokenizer_file), dtype]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)


def _serve(tokenizer_file: str, dtype: str) -> None:
    """Read texts from standard input and write their ids to standard output until the input ends."""
    encoder = Encoder(Tokenizer.from_file(tokenizer_file), dtype)
    while True:
        try:
            raw, _ = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(sys.stdout.buffer, *encoder(raw.decode()))
        except BrokenPipeError:
            return  # whoever asked has gone


def _send(file: IO[bytes], raw: bytes, number: int) -> None:
    file.write(HEADER.pack(len(raw), number))
    file.write(raw)
    file.flush()


def _receive(file: IO[bytes]) -> tuple[bytes, int]:
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    length, number = HEADER.unpack(header)
    raw = file.read(length)
    if len(raw) < length:
        raise EOFError
    return raw, number


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    _serve(*sys.argv[1:])
