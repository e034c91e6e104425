"""`gam chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gam_lm.cli.numbers import Count, DrawSeed, Temperature, TopP
from gam_lm.errors import InputError

if TYPE_CHECKING:
    from gam_lm.inference.context import Context
    from gam_lm.serve.chat import Chat as Writing

PROMPT = "> "
ANEW = "/new"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model: a line is a message, /new starts anew, Ctrl-C ends an answer, Ctrl-D ends the chat. What you write stays text: `<|endoftext|>` in a
    message is no special token.
    """

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model": ("run_directory", "system", "max_new_tokens"),
        "Sampling": ("temperature", "top_k", "top_p", "seed"),
        "Machine": ("device",),
    }

    run_directory: Path
    """Run directory of the model; `gam train --chat` makes one that answers."""
    system: str = ""
    """A message that stands before the first of yours."""
    max_new_tokens: Count = 256
    """Where an answer ends at the latest."""
    temperature: Temperature = 0.8
    """0 takes the likeliest token."""
    top_k: Count | None = None
    """Draw from the k likeliest tokens."""
    top_p: TopP = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: DrawSeed | None = None
    """Of the draws; the same seed and messages give the same answers."""
    start: Path | None = None
    """Initial memory that `gam tune-state` wrote for this run."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Read messages from the terminal, or from a pipe, and print the answers as they come."""
        from gam_lm.checkpoint import load_tokenizer_of
        from gam_lm.cli.starting import load_started
        from gam_lm.data.tokenizer import check_characters
        from gam_lm.inference.context import Context
        from gam_lm.serve.chat import Chat as Writing
        from gam_lm.serve.chat import read_chat_template

        check_characters(self.system, "system")
        model = load_started(self.run_directory, self.start, self.device)
        tokenizer = load_tokenizer_of(self.run_directory)
        writing = Writing(tokenizer, *read_chat_template(self.run_directory))
        if writing.template is None:
            print(f"{self.run_directory} has learned no conversations: it goes on with lines that begin with User: and Assistant:", file=sys.stderr)
        start: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        messages, context = list(start), Context(model)
        read: list[int] = []
        for line in _lines():
            check_characters(line, "standard input")
            if line == ANEW:
                messages, context, read = list(start), Context(model), []
                continue
            messages.append({"role": "user", "content": line})
            ids = writing.ids(messages)
            if ids[: len(read)] != read or len(ids) == len(read):  # the template wrote the past anew
                context, read = Context(model), []
            model.config.check_length("the chat's length", len(ids))
            context.read(ids[len(read) :])
            read = ids
            answer = ""
            try:
                for piece in self._answer(context, writing):
                    answer += piece
                    print(piece if answer != piece else piece.lstrip(), end="", flush=True)
            except KeyboardInterrupt:
                pass  # of this answer: what came of it stays part of the chat
            print(flush=True)
            messages.append({"role": "assistant", "content": answer.strip()})

    def _answer(self, context: Context, writing: Writing) -> Iterator[str]:
        from gam_lm.inference.continuation import Sampling, continue_text
        from gam_lm.serve.stopping import StopTexts

        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        held = StopTexts(writing.ends)
        for piece in continue_text(context, writing.tokenizer, sampling, max_new_tokens=self.max_new_tokens):
            said, ended = held.add(piece)
            if said:
                yield said
            if ended:
                return
        if held.rest:
            yield held.rest


def _lines() -> Iterator[str]:
    """Messages: lines that hold something, with a prompt where somebody types them."""
    while True:
        try:
            line = input(PROMPT) if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 (byte {error.start} of what was read): convert it to UTF-8") from error
        if line := line.strip():
            yield line
