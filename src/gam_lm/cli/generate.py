"""`gam generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gam_lm.cli.numbers import Count, DrawSeed, Natural, Temperature, TopP


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt; GAM and Mamba take the same time and memory for every token."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model and text": ("run_directory", "prompt", "state", "max_new_tokens"),
        "Sampling": ("temperature", "top_k", "top_p", "seed"),
        "Machine": ("compile", "device"),
    }

    run_directory: Path
    """Run directory of the model."""
    prompt: str = ""
    """Text to go on from; empty starts a new document."""
    max_new_tokens: Natural = 256
    """Where to end; 0 goes on until interrupted."""
    temperature: Temperature = 0.8
    """0 takes the likeliest token."""
    top_k: Count | None = None
    """Draw from the k likeliest tokens."""
    top_p: TopP = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: DrawSeed | None = None
    """Of the draws; the same seed gives the same text."""
    compile: bool = False
    """Compile the step of one token first: some seconds, then faster."""
    state: Path | None = None
    """Go on from the text that `gam read` has read, at once."""
    start: Path | None = None
    """Initial memory that `gam tune-state` wrote for this run."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Print the text as it comes."""
        from gam_lm.checkpoint import load_tokenizer_of
        from gam_lm.cli.starting import load_started
        from gam_lm.data.tokenizer import check_characters
        from gam_lm.inference.generation import generate_text

        check_characters(self.prompt, "prompt")
        model = load_started(self.run_directory, self.start, self.device)
        tokenizer = load_tokenizer_of(self.run_directory)
        if self.state is not None:
            self._from_state(model, tokenizer, self.state)
            return
        pieces = generate_text(
            model, tokenizer, self.prompt, max_new_tokens=self.max_new_tokens or None, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, seed=self.seed, compiled=self.compile,
        )  # fmt: skip
        print(self.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    def _from_state(self, model: Any, tokenizer: Any, state: Path) -> None:
        from gam_lm.data.tokenizer import ids_of
        from gam_lm.errors import InputError
        from gam_lm.inference.context import Context
        from gam_lm.inference.continuation import Sampling, continue_text

        if self.compile:
            raise InputError("compile is true: leave out --compile or --state, a saved state is continued step by step")
        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        context = Context.load(state, model, tokenizer)
        if ids := ids_of(tokenizer, self.prompt, "prompt"):
            context.read(ids)
        print(self.prompt, end="", flush=True)
        for piece in continue_text(context, tokenizer, sampling, max_new_tokens=self.max_new_tokens or None):
            print(piece, end="", flush=True)
        print()
