"""Models side by side: the loss of every seed, by model and by results folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gam_lm.report.compare import find
from gam_lm.report.plots import COLOURS, MARKERS, new_figure, save
from gam_lm.report.verdict import loss_on
from gam_lm.results import measured_on

ROW = 0.34
"""Of one model, in inches."""


def seed_plot(places: Sequence[str], stem: Path, *, split: str = "val") -> list[Path]:
    """A line for each model, the lowest at the top: a point for each seed, a bar at their mean, a colour and a marker for each folder.

    Args:
        places: DIR or DIR:MODEL, as gam_lm.report.compare.find takes them.
        stem: the pictures' path without its ending.
        split: val, test, or a further text.

    Returns:
        The SVG and the PNG.

    Raises:
        InputError: for a place without results.
        MissingExtraError: where matplotlib is not installed.
    """
    models = list({each.place: each for place in places for each in find(place)}.values())
    losses: dict[str, dict[Path, list[float]]] = {}
    for each in models:
        if rows := each.compared(split):
            losses.setdefault(each.name, {})[each.directory] = [measured_on(row, split)["nats_per_token"] for row in rows]
    order = sorted(losses, key=lambda name: min(float(np.mean(each)) for each in losses[name].values()))
    folders = list(dict.fromkeys(each.directory for each in models))
    labels = [folder.name if len({each.name for each in folders}) == len(folders) else str(Path(*folder.parts[-2:])) for folder in folders]
    figure, axes = new_figure(1.3 + ROW * max(3, len(order)))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    for i, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        style: dict[str, Any] = {"color": COLOURS[(0, 7, 2, 3)[i % 4]], "linestyle": "none"}
        height = (i - (len(folders) - 1) / 2) * min(0.25, 0.6 / len(folders))  # folders a little above each other, so that none hides another
        named = {name: losses[name][folder] for name in order if folder in losses[name]}
        seeds = [(loss, order.index(name) + height) for name, some in named.items() for loss in some]
        means = [(float(np.mean(some)), order.index(name) + height) for name, some in named.items()]
        axes.plot(*zip(*seeds, strict=True), marker=MARKERS[i % len(MARKERS)], markersize=4, alpha=0.8, label=label, **style)
        axes.plot(*zip(*means, strict=True), marker="|", markersize=13, markeredgewidth=2, **style)
        for x, y in means if len(folders) == 1 else ():
            axes.annotate(f"{x:.3f}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.7)
    axes.set_xlabel(f"{loss_on(split)} (nats per token): each seed, and the mean")
    if len(folders) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(folders), frameon=False)
    return save(figure, stem)
