"""`gam bench-distributed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gam_lm.cli.flags import command_line
from gam_lm.cli.numbers import Count
from gam_lm.cli.terminal import show
from gam_lm.presets.compared import DISTRIBUTED


@dataclass(frozen=True, kw_only=True)
class BenchDistributed:
    """Whether several processes make the run of one, on this machine's CPU: weights and losses, speed, and a run that moves between numbers of them."""

    out: Path
    """Folder for results.json and table.md."""
    models: tuple[str, ...] = DISTRIBUTED
    """Names of the models."""
    processes: tuple[Count, ...] = (2, 4)
    """Numbers of processes beside one."""
    steps: Count = 50
    """Optimiser steps of the runs that are compared."""
    speed_steps: Count = 6
    """Optimiser steps of the runs that are timed."""

    only: tuple[Literal["equality", "sharding", "rounding", "memory", "speed", "faults", "saves"], ...] = (
        "equality", "sharding", "rounding", "memory", "speed", "faults", "saves",
    )  # fmt: skip
    """What is measured; faults: processes that are killed or stopped; saves: the cost of states that are written beside the training."""

    def run(self) -> None:
        """Measure what is missing, then write the table."""
        from gam_lm.experiments.distributed import Protocol, measure_distributed
        from gam_lm.report.distributed import write_distributed
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment

        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        measure_distributed(self.models, self.processes, Protocol(steps=self.steps, speed_steps=self.speed_steps), results, self.only)
        show(write_distributed(self.out))
        print(f"table: {self.out / 'table.md'}")
