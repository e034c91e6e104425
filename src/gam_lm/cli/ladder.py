"""`gam bench-plan`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal

from gam_lm.cli.flags import command_line
from gam_lm.cli.numbers import Above, Count, Seed
from gam_lm.cli.terminal import show
from gam_lm.errors import InputError
from gam_lm.presets.models import DEFAULT_MODEL
from gam_lm.training.plan import SIZES, vocabulary_for


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """Train models of several sizes on texts of several lengths, each for so many minutes; the same command goes on with what is missing.

    The rules of `gam train` (gam_lm/training/plan.py) are read off its table.
    """

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "What is trained": ("models", "data", "bytes", "sizes", "vocab_sizes", "rates", "seeds"),
        "Time": ("minutes",),
        "Output": ("out",),
        "Machine": ("device",),
    }

    out: Path
    """Folder for results.json, table.md, the texts and the runs."""
    data: str = "gutenberg"
    """Corpus name or path of a text that is long enough for all."""
    bytes: tuple[Count, ...] = (50_000, 1_000_000, 10_000_000)
    """Bytes of training text, from its start."""
    minutes: tuple[Above, ...] = (2.0, 10.0)
    """Of every run."""
    sizes: tuple[str, ...] = tuple(f"{size.hidden_size}x{size.num_hidden_layers}" for size in SIZES[:4])
    """WIDTHxLAYERS of the models."""
    vocab_sizes: tuple[Count, ...] = ()
    """Entries of the tokenizers; by default what the rule gives."""
    rates: tuple[Above, ...] = (1.0,)
    """Times the learning rates of the rule."""
    batch_sizes: tuple[Count, ...] = ()
    """Sequences in a batch; by default what the rule gives."""
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    """Names of the models."""
    seeds: tuple[Seed, ...] = (0,)
    """One run for each."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the matrix products; auto takes bf16 where the device computes it natively."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Train what is missing and write the table."""
        from gam_lm.data.corpora import load_corpus
        from gam_lm.experiments.ladder import Rung, climb
        from gam_lm.report.ladder import write_ladder
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device

        rungs = [
            Rung(
                text_bytes=text_bytes, minutes=minutes, hidden_size=width, num_hidden_layers=layers, vocab_size=vocab_size, rate=rate, batch_size=batch_size,
                seed=seed, model=model, precision=self.precision,
            )
            for text_bytes, minutes, model, (width, layers), rate, batch_size, seed in product(
                self.bytes, self.minutes, self.models, map(_size, self.sizes), self.rates, self.batch_sizes or (None,), self.seeds
            )
            for vocab_size in self.vocab_sizes or (vocabulary_for(text_bytes, minutes),)
        ]  # fmt: skip
        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        climb(rungs, load_corpus(self.data), results, self.out, choose_device(self.device))
        show(write_ladder(self.out))
        print(f"table: {self.out / 'table.md'}")


def _size(text: str) -> tuple[int, int]:
    width, _, layers = text.partition("x")
    if not (width.isdecimal() and layers.isdecimal() and int(width) and int(layers)):
        raise InputError(f"sizes has {text!r}: write WIDTHxLAYERS, as in 128x4")
    return int(width), int(layers)
