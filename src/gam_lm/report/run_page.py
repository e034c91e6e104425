"""The page of one training run, from its metrics.jsonl and what is known of it: curves, samples, the memory's use, the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gam_lm.report.chart import Line, chart
from gam_lm.report.page import templates
from gam_lm.report.plots import colour
from gam_lm.report.tables import Table
from gam_lm.runtime.files import write_text

MOST_POINTS = 400
"""Of the training loss: of a longer run each point is the mean of several lines."""

SHOWN_SAMPLES = 3
"""Samples that are not folded away."""

SHADES = (0.95, 0.7, 0.45, 0.22)
"""How strong the parts of a bar are, the nearest tokens first."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the page says besides the figures in metrics.jsonl."""

    name: str
    """Of the run directory."""
    model: str
    """Name of the model."""
    steps: int
    """Of the whole run."""
    plan: Sequence[str]
    """Lines of the plan: a word, and what is planned."""
    command: str
    """What repeats the run."""
    bits_per_nat: float | None = None
    """Bits per byte for a nat per token of the validation text; None where its bytes are not counted."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """What counting gets, in nats per token."""
    meaning: str = ""
    """One sentence on the last validation beside the floors."""
    kept_step: int | None = None
    """The step whose weights a finished run keeps; None while it runs."""


def run_page(lines: Sequence[Mapping[str, Any]], facts: RunFacts) -> str:
    """The page as HTML that needs nothing beside it.

    Args:
        lines: of metrics.jsonl, at least one with ``val_nats``; as far as a line has them, also ``sample`` (text), ``by_place`` (pairs of tokens read before and
            nats per token) and ``memory`` (see gam_lm.diagnostics.memory_use).
        facts: the rest.
    """
    validations = [line for line in lines if "val_nats" in line]
    last = validations[-1]
    kept = next((line for line in validations if line["step"] == facts.kept_step), last)
    shade = colour(facts.model).replace("#000000", "currentColor")
    samples = [line for line in reversed(validations) if line.get("sample")]
    memory: Sequence[Mapping[str, float]] = next((line["memory"] for line in reversed(validations) if any(line.get("memory") or ())), [])
    places: Sequence[Sequence[float]] = next((line["by_place"] for line in reversed(validations) if line.get("by_place")), [])
    return templates().get_template("run.html.j2").render(
        facts=facts, last=last, kept=kept, finished=facts.kept_step is not None, bits=facts.bits_per_nat, plan=[line.partition("  ") for line in facts.plan],
        curve=_curve(lines, validations, facts, shade), validations=_table(validations, facts), samples=samples, shown=SHOWN_SAMPLES, memory=_bars(memory),
        memory_table=memory_table(memory), places=_places(places, shade), shades=SHADES, shade=shade,
    )  # fmt: skip


def write_run_page(path: Path, lines: Sequence[Mapping[str, Any]], facts: RunFacts) -> None:
    """Write `run_page`. Raises InputError where the place cannot be written."""
    write_text(path, run_page(lines, facts).encode("utf-8", "backslashreplace").decode())  # a name of a file may be no UTF-8


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def memory_table(memory: Sequence[Mapping[str, float]]) -> Table:
    """Where each layer's reads come from: the figures that the bars draw."""
    names = list(dict.fromkeys(name for layer in memory for name in layer))
    rows = [[str(i), *(_cell(layer.get(name), name) for name in names)] for i, layer in enumerate(memory)]
    return Table(columns=["Layer", *names], rows=rows, title="Where reads of the memory come from")


def _cell(value: float | None, name: str) -> str:
    return "" if value is None else f"{value:.3f}" if name == "write gate" else f"{100 * value:.1f} %"


def _curve(lines: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]], facts: RunFacts, shade: str) -> str:
    several = math.ceil(len(lines) / MOST_POINTS)
    groups = [lines[i : i + several] for i in range(0, len(lines), several)]
    trained = [(float(group[-1]["step"]), math.fsum(line["train_nats"] for line in group) / len(group)) for group in groups]
    validated = [(float(line["step"]), line["val_nats"]) for line in validations]
    drawn = [Line(name="training", points=trained, colour="var(--quiet)"), Line(name="validation", points=validated, colour=shade, marked=True)]
    counts = {f"{name} counts" if name != "xz" else name: value for name, value in facts.floors.items()}
    return chart(drawn, "optimiser steps", "loss (nats per token)", "Loss against optimiser steps: training, validation and what counting gets", across=counts)


def _places(places: Sequence[Sequence[float]], shade: str) -> str:
    if len(places) < 2:
        return ""
    line = Line(name="validation", points=[(float(x), float(y)) for x, y in places], colour=shade, marked=True)
    return chart([line], "tokens read before", "loss (nats per token)", "Validation loss against the number of tokens read before in the block", doubling=True)


def _table(validations: Sequence[Mapping[str, Any]], facts: RunFacts) -> Table:
    columns = ["Step", "Tokens", "Seconds", "Training loss", "Validation loss", *([] if facts.bits_per_nat is None else ["Bits per byte"])]
    rows = [
        [
            f"{line['step']:,}", f"{line['tokens']:,}", f"{line['seconds']:,.0f}", f"{line['train_nats']:.4f}", f"{line['val_nats']:.4f}",
            *([] if facts.bits_per_nat is None else [f"{line['val_nats'] * facts.bits_per_nat:.4f}"]),
        ]
        for line in validations
    ]  # fmt: skip
    note = "Losses in nats per token. The training loss is the mean since the line of metrics before."
    return Table(columns=columns, rows=rows, title="Every validation", note=note)


def _bars(memory: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """A bar for each layer that has a memory: its parts from left to right, with what is said of each."""
    return [
        {"layer": i, "gate": layer["write gate"], "parts": [(name, share) for name, share in layer.items() if name != "write gate"]}
        for i, layer in enumerate(memory) if layer
    ]  # fmt: skip
