"""`gam bench-tune-state`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gam_lm.cli.flags import command_line
from gam_lm.cli.numbers import Above, Count, Seed
from gam_lm.cli.terminal import show


@dataclass(frozen=True, kw_only=True)
class BenchTuneState:
    """Tune a model on other texts: its initial memory, low-rank adapters of the same size, all weights; each with the same learning rates.

    The same command goes on with what is missing.
    """

    run_directory: Path
    """Run directory of the model."""
    out: Path = Path("runs/tune-state")
    """Folder for results.json and table.md."""
    data: tuple[str, ...] = ("tinyshakespeare", "stdlib", "wikitext-2-v1")
    """Corpus names or paths."""
    rates: tuple[Above, ...] = (2e-3, 1e-2, 5e-2)
    """Learning rates."""
    seeds: tuple[Seed, ...] = (0,)
    """One run for each."""
    steps: Count = 40
    """Optimiser steps of a run."""
    batch_size: Count = 8
    """Sequences per step."""
    context: Count = 256
    """Tokens per sequence."""
    valid_tokens: Count = 16_384
    """Tokens of each validation split, from its start, that are measured."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Train what is missing and write the table."""
        from gam_lm.experiments.state_tuning import Tuning
        from gam_lm.presets.setups import ADAMW
        from gam_lm.report.state_tuning import write_state_tuning
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device
        from gam_lm.training.recipe import TrainConfig

        recipe = TrainConfig(**ADAMW, steps=self.steps, batch_size=self.batch_size, context=self.context, warmup_steps=10, weight_decay=0.0, compile="off")
        tuning = Tuning(run=self.run_directory, texts=self.data, rates=self.rates, seeds=self.seeds, recipe=recipe, valid_tokens=self.valid_tokens)
        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        tuning.measure(results, choose_device(self.device))
        show(write_state_tuning(self.out))
        print(f"table: {self.out / 'table.md'}")
