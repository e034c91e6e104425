"""What the measurements of speed and memory share: the limits of a process, and measuring what is missing in a results.json, row by row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gam_lm.inference.compiling import obstacle
from gam_lm.ops.number_formats import has_bf16
from gam_lm.results import Results
from gam_lm.runtime.isolation import OK, Isolated, Peak, measured
from gam_lm.runtime.progress import progress

logger = logging.getLogger("gam_lm")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a process measures, and how far it may go."""

    warmup: int = 5
    """Passes, steps or tokens before those that are timed."""
    limit_seconds: float = 60.0
    """The most that a process may take."""
    limit_mb: float | None = None
    """The most resident memory of a process; by default 80 % of what is available. A GPU has its own limit."""

    def measured(
        self, function: Callable[[Mapping[str, Any], Peak], Mapping[str, Any]], parameters: Mapping[str, Any], device: torch.device, *, isolated: bool
    ) -> Isolated:
        """Call ``function`` on ``parameters``, the device and the warm-up, within the limits; see `gam_lm.runtime.isolation.measured`."""
        given = {**parameters, "device": str(device), "warmup": self.warmup}
        return measured(function, given, isolated=isolated, seconds=self.limit_seconds, memory_mb=self.limit_mb)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that are measured together."""

    label: str
    """What they have in common."""
    rows: Sequence[Row]
    """What tells each of them from the others."""


def measure_missing(
    description: str,
    unit: str,
    groups: Iterable[Group],
    measure: Callable[[Sequence[Row]], Iterable[tuple[Row, Isolated]]],
    name_of: Callable[[Row], str],
    words: Callable[[Row], str],
    results: Results,
    go_on: Callable[[], bool],
) -> None:
    """Measure the rows that ``results`` does not have; each is written, and said, as soon as it comes.

    Args:
        description: of the work, for its progress bar.
        unit: of the progress.
        groups: what is wanted, in this order.
        measure: takes the missing rows of a group, at least one, and gives each with what came of it.
        name_of: the name of a row.
        words: what came of a row that went well.
        results: an open results.json.
        go_on: asked before each group that lacks rows; False ends the work, to be gone on with later.
    """
    groups = list(groups)
    with progress(description, len(groups), unit) as bar:
        for group in groups:
            missing = [row for row in group.rows if results.find(row) is None]
            if missing and not go_on():
                return
            if missing:
                bar.now(group.label)
            for row, found in measure(missing) if missing else ():
                full = {**row, "outcome": found.outcome, **found.figures}
                results.add(full)
                logger.info("%s: %s", name_of(row), words(full) if found.outcome == OK else found.outcome)
            bar.advance()


def possible(variants: Sequence[tuple[str, str]], device: torch.device) -> list[tuple[str, str]]:
    """The pairs without "compiled" where nothing can be compiled, without "graph" where there are no CUDA graphs, and without "bf16" where the device would
    only emulate it; why is logged.

    Args:
        variants: pairs of a way of computing and a number format, in either order.
        device: where.
    """
    no_graphs = None if device.type == "cuda" else f"{device.type} has no CUDA graphs"
    for way, reason in (("compiled", obstacle(device)), ("graph", no_graphs), ("bf16", emulated("bf16", device))):
        if reason and any(way in each for each in variants):
            logger.warning("%s variants are left out: %s", way, reason)
            variants = [each for each in variants if way not in each]
    return list(variants)


def emulated(dtype: str, device: torch.device) -> str | None:
    """Why times of a number format would say nothing about it on a device; None where it computes the format natively."""
    if dtype != "bf16" or has_bf16(device):
        return None
    return f"this {'processor' if device.type == 'cpu' else device.type} has no bf16 instructions and would emulate them"
