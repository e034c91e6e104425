"""What each slot of a model is for, as CSV, JSON and a page. A slot comes as ``gam_lm.diagnostics.slots.SlotUse.to_dict`` gives it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gam_lm.report.compare import with_interval
from gam_lm.report.page import templates
from gam_lm.report.tables import Table
from gam_lm.runtime.files import replacing, write_text

Slot = Mapping[str, Any]

PLAIN = (
    "layer", "memory", "slot", "mean_share", "largest_share", "top_tokens", "dead", "write_share", "removal_nats", "removal_half_width", "fires_on",
    "near_address", "near_value",
)  # fmt: skip
"""Columns of the CSV."""


def memories(slots: Iterable[Slot]) -> dict[tuple[int, str], list[Slot]]:
    """The slots by layer and memory, those with the largest share of the reads first."""
    found: dict[tuple[int, str], list[Slot]] = {}
    for slot in slots:
        found.setdefault((slot["layer"], slot["memory"]), []).append(slot)
    return {key: sorted(group, key=lambda slot: -slot["mean_share"]) for key, group in found.items()}


def overview(slots: Iterable[Slot]) -> Table:
    """A row for each memory of each layer: how many of its slots are dead, how even its reads are, and what its most read slots are worth."""
    lines = []
    for (layer, memory), group in memories(slots).items():
        dead = sum(slot["dead"] for slot in group)
        # The inverse Simpson index: that many slots, read alike, would be as uneven.
        even = 1 / sum(slot["mean_share"] ** 2 for slot in group)
        removed = [slot for slot in group if slot["removal_nats"] is not None]
        worst = max(removed, key=lambda slot: slot["removal_nats"], default=None)
        lines.append([
            str(layer), memory, str(len(group)), str(dead), f"{even:.1f}", f"{100 * group[0]['mean_share']:.1f} %",
            "" if worst is None else f"{worst['slot']}: {_loss(worst)}",
        ])  # fmt: skip
    columns = ["Layer", "Memory", "Slots", "Dead", "Slots in use", "Largest share", "Worst to lose (nats/token)"]
    note = (
        "Dead: read with less than a hundredth of an equal share. Slots in use: so many, read alike, would be as uneven (inverse Simpson index). "
        "Worst to lose: the largest loss among the slots taken out; its interval does not count that it was chosen as the largest."
    )
    return Table(columns=columns, rows=lines, title="Memories", note=note)


def slot_table(layer: int, memory: str, group: Sequence[Slot]) -> Table:
    """A row for each slot of a memory."""
    written = group[0]["write_share"] is not None
    lines = []
    for slot in group:
        cells = [
            str(slot["slot"]), f"{100 * slot['mean_share']:.2f} %", f"{100 * slot['largest_share']:.1f} %", str(slot["top_tokens"]),
            *([f"{100 * slot['write_share']:.2f} %"] if written else []), "dead" if slot["dead"] else "", _loss(slot),
            _listed([(f"{text}", share) for _, text, share in slot["fires_on"]]), _listed(slot["near_address"]), _listed(slot["near_value"]),
        ]  # fmt: skip
        lines.append(cells)
    columns = [
        "Slot", "Share of reads", "Largest share", "Tokens it leads", *(["Share of writes"] if written else []), "Dead", "Loss without it (nats/token)",
        "Fires on (share)", "Tokens near its address (cosine)", "Tokens it speaks for (cosine)",
    ]  # fmt: skip
    return Table(columns=columns, rows=lines, title=f"Layer {layer}, {memory} memory")


def write_csv(slots: Sequence[Slot], about: Mapping[str, Any], path: Path) -> None:
    """Write a row for each slot; what a cell lists stands in it as JSON."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PLAIN)
        for slot in slots:
            writer.writerow([json.dumps(slot[key], ensure_ascii=False) if isinstance(slot[key], list) else slot[key] for key in PLAIN])


def write_json(slots: Sequence[Slot], about: Mapping[str, Any], path: Path) -> None:
    """Write ``about`` with all slots under ``slots``."""
    write_text(path, json.dumps({**about, "slots": slots}) + "\n")


def write_page(slots: Sequence[Slot], about: Mapping[str, Any], path: Path) -> None:
    """Write a page: choose the layer, sort by any column, find a token; ``about`` has ``run``, ``model`` and ``tokens``."""
    tables = [(layer, slot_table(layer, memory, group)) for (layer, memory), group in memories(slots).items()]
    layers = sorted({layer for layer, _ in tables})
    write_text(path, templates().get_template("slots.html.j2").render(about=about, overview=overview(slots), tables=tables, layers=layers))


def _loss(slot: Slot) -> str:
    return "" if slot["removal_nats"] is None else with_interval(slot["removal_nats"], slot["removal_half_width"])


def _listed(pairs: Sequence[Sequence[Any]]) -> str:
    return "  ".join(f"{visible(text)} {value:.2f}" for text, value in pairs)


def visible(text: str) -> str:
    """A token with its spaces and line breaks to be seen."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"
