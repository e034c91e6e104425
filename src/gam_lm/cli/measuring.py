"""What the verbs that measure speed and memory share: their flags, and how they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gam_lm.cli.architecture import Architecture, on_flags
from gam_lm.cli.flags import command_line
from gam_lm.cli.numbers import Above
from gam_lm.cli.terminal import show
from gam_lm.errors import InputError

if TYPE_CHECKING:
    import torch

    from gam_lm.results import Results


@dataclass(frozen=True, kw_only=True)
class Measuring(ABC):
    """A verb that measures what is missing in a results.json, then writes table and plots. A subclass says what."""

    out: Path
    """Folder for results.json, tables and plots."""
    limit_mb: Above | None = None
    """The most memory of a process in MB before its row is "out of memory"; by default 80 % of what is available."""
    architecture: Architecture = on_flags({})
    device: str = "auto"
    """auto, cpu, cuda …"""

    @abstractmethod
    def measure(self, results: Results, device: torch.device) -> None:
        """Measure what ``results`` does not have."""

    @abstractmethod
    def write(self) -> str:
        """Write table and plots; the table."""

    def run(self) -> None:
        """Measure what is missing, then write table and plots."""
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device

        device = choose_device(self.device)
        results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        self.measure(results, device)
        if not results.rows:
            raise InputError("nothing could be measured on this machine, for the reasons above: choose other variants or precisions")
        show(self.write())
        print(f"table and plots: {self.out}")
