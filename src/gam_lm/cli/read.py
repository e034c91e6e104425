"""`gam read`: a text of any length, read once, its state kept in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from gam_lm.cli.numbers import Count, Natural
from gam_lm.errors import InputError

CHARACTERS = 1 << 16
"""Read and tokenised at a time."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Read a text once, in bounded memory, and write the state: `gam generate RUN --state FILE` goes on from there at once."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model and text": ("run_directory", "text", "state"),
        "Output": ("out", "every", "keep"),
        "Machine": ("device",),
    }

    run_directory: Path
    """Run directory of the model."""
    text: Path
    """UTF-8 text file; - reads standard input."""
    out: Path | None = None
    """File to write, in safetensors format; by default the text's name with .state."""
    state: Path | None = None
    """Go on from this state of an earlier `gam read`."""
    every: Count = 256
    """Tokens between the earlier states that are kept for going back."""
    keep: Natural = 8
    """Earlier states to keep."""
    start: Path | None = None
    """Initial memory that `gam tune-state` wrote for this run."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Read, write the state and say how large it is."""
        import time

        from gam_lm.checkpoint import load_tokenizer_of
        from gam_lm.cli.starting import load_started
        from gam_lm.inference.context import Context
        from gam_lm.runtime.progress import progress

        model = load_started(self.run_directory, self.start, self.device)
        tokenizer = load_tokenizer_of(self.run_directory)
        context = Context(model, every=self.every, keep=self.keep) if self.state is None else Context.load(self.state, model, tokenizer)
        before, started, size = context.count, time.perf_counter(), None
        with self._opened() as file:
            if self.text.is_file():
                size = self.text.stat().st_size
            with progress(f"reading {self.text}", size, "bytes") as shown:
                for piece in pieces(file, str(self.text)):
                    if ids := tokenizer.encode(piece, add_special_tokens=False).ids:
                        context.read(ids)
                    shown.advance(len(piece.encode()))
        if context.count == 0:
            raise InputError(f"text {str(self.text)!r} is empty: give a text of at least one token")
        out = self.out or Path("text.state" if str(self.text) == "-" else self.text.with_suffix(".state").name)
        context.save(out, tokenizer)
        read, seconds = context.count - before, time.perf_counter() - started
        print(f"read {read:,} tokens in {seconds:.1f} s ({read / seconds:,.0f} tokens/s); state of {context.nbytes:,} bytes: {out}")

    def _opened(self) -> IO[str] | nullcontext[IO[str]]:
        if str(self.text) == "-":
            return nullcontext(sys.stdin)
        try:
            return self.text.open(encoding="utf-8", newline="")
        except (OSError, ValueError) as error:
            raise InputError(f"text {str(self.text)!r} cannot be read ({getattr(error, 'strerror', None) or error}): give a UTF-8 text file") from error


def pieces(file: IO[str], name: str, characters: int = CHARACTERS) -> Iterator[str]:
    """The text in pieces of about ``characters``, cut before a space between two words, where a tokenizer cuts too.

    Raises InputError where the text is not UTF-8.
    """
    rest = ""
    while True:
        try:
            more = file.read(characters)
            more.encode()  # a lone surrogate is no text; standard input lets one through
        except UnicodeError as error:
            raise InputError(f"text {name!r} is not UTF-8 ({error}): convert it first") from error
        rest += more
        if not more:
            break
        place = len(rest) - 1
        while (place := rest.rfind(" ", 1, place)) > 0:
            if rest[place - 1].isalnum() and rest[place + 1].isalnum():
                yield rest[:place]
                rest = rest[place:]
                break
        else:
            if len(rest) >= 16 * characters:  # no word ends: cut anywhere
                yield rest
                rest = ""
    if rest:
        yield rest
