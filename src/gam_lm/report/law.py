"""The loss of one model at several sizes and horizons, and the scaling law through it.

    L(N, T) = E + A · N^−α + B · T^−β        N parameters, T training tokens, L nats per token

is the form of Hoffmann et al., Training Compute-Optimal Large Language Models, arXiv 2203.15556, section 3.3. For given exponents it is linear in E, A and B, so the
exponents are searched and the rest is solved for (variable projection, Golub & Pereyra 1973), by least squares in nats. Only the ends of runs count: a point on the
way of a schedule that cools down later is not the loss of a run that ends there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from gam_lm.report.compare import diverged
from gam_lm.report.plots import Lines, new_figure, powers_of_two, save
from gam_lm.report.rows import Row, by_variant, trained
from gam_lm.report.tables import Table

SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size")
HORIZON = ("steps", "epochs")
RATES = ("learning_rate", "muon_learning_rate")

SIZES_NEEDED, HORIZONS_NEEDED, POINTS_NEEDED = 3, 3, 6
"""An exponent takes three values of what it is an exponent of; the law has five numbers."""

EXPONENTS = (0.02, 3.0)
"""Range of the exponents that are tried; one at its edge is not determined by the points."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The end of a run, or the mean over its seeds."""

    size: str
    """Width × layers."""
    parameters: int
    """All of them, embeddings included."""
    tokens: int
    loss: float
    """Validation loss in nats per token."""
    seconds: float | None = None
    """Time of training at the speed that was measured in turns with the others; None where it was not."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """The five numbers, and how far the points are from them."""

    floor: float
    """E."""
    of_parameters: float
    """A."""
    alpha: float
    of_tokens: float
    """B."""
    beta: float
    residuals: tuple[float, ...]
    """Measured − fitted, in nats per token, in the points' order."""

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, T)."""
        return float(self.floor + self.of_parameters * parameters**-self.alpha + self.of_tokens * tokens**-self.beta)


def fit_law(points: Sequence[Point]) -> Law | None:
    """The law of least squares with E, A and B of at least 0; None where the points do not determine it."""
    if len(points) < POINTS_NEEDED or len({each.size for each in points}) < SIZES_NEEDED or len({each.tokens for each in points}) < HORIZONS_NEEDED:
        return None
    parameters, tokens, losses = (np.array([getattr(each, name) for each in points], float) for name in ("parameters", "tokens", "loss"))
    middle = np.exp(np.log(parameters).mean()), np.exp(np.log(tokens).mean())  # so that the columns are of one magnitude

    def solve(alpha: float, beta: float) -> tuple[float, Any]:
        columns = np.stack([np.ones_like(losses), (parameters / middle[0]) ** -alpha, (tokens / middle[1]) ** -beta], 1)
        found = np.linalg.lstsq(columns, losses, rcond=None)[0]
        return (float(((columns @ found - losses) ** 2).sum()), found) if (found >= 0).all() else (np.inf, found)

    ranges = [EXPONENTS, EXPONENTS]
    for _ in range(8):  # each time around the best, a sixth as wide
        grids = [np.geomspace(*each, 25) for each in ranges]
        error, alpha, beta = min((solve(a, b)[0], a, b) for a in grids[0] for b in grids[1])
        if error == np.inf:
            return None
        ranges = [_around(best, grid) for best, grid in zip((alpha, beta), grids, strict=True)]
    if any(best < 1.01 * EXPONENTS[0] or best > 0.99 * EXPONENTS[1] for best in (alpha, beta)):
        return None
    _, (floor, a, b) = solve(alpha, beta)
    law = Law(
        floor=float(floor), of_parameters=float(a * middle[0] ** alpha), alpha=float(alpha), of_tokens=float(b * middle[1] ** beta), beta=float(beta), residuals=()
    )
    return replace(law, residuals=tuple(each.loss - law.loss(each.parameters, each.tokens) for each in points))


def _around(best: float, grid: Any) -> tuple[float, float]:
    """The range between the places two beside the best one of a grid, within the range of the exponents."""
    step = (grid[1] / grid[0]) ** 2
    return max(EXPONENTS[0], best / step), min(EXPONENTS[1], best * step)


def points_of(results: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The ends of the runs by model, by size and horizon: the mean over the seeds that did not diverge, with the best of several learning rates."""
    found: dict[str, list[Point]] = {}
    for model, rows in by_variant(_ended(results), aside=lambda row: (*SIZES, *HORIZON, *RATES)).items():
        cells: dict[tuple[int, str, int], dict[tuple[Any, ...], list[Row]]] = {}
        for row in rows:
            config, rates = row["model_config"], tuple(row["train_config"].get(name) for name in RATES)
            cell = row["parameters"], f"{config['hidden_size']} × {config['num_hidden_layers']}", row["train_tokens"]
            cells.setdefault(cell, {}).setdefault(rates, []).append(row)
        found[model] = []
        for (parameters, size, tokens), by_rates in sorted(cells.items()):
            loss, some = min(((fmean(row["val_nats_per_token"] for row in each), each) for each in by_rates.values()), key=lambda each: each[0])
            timed = all("tokens_per_second" in row for row in some)
            seconds = tokens / fmean(row["tokens_per_second"] for row in some) if timed else None
            found[model].append(Point(size=size, parameters=parameters, tokens=tokens, loss=loss, seconds=seconds))
    return found


def _ended(results: Mapping[str, Any]) -> list[Row]:
    needed = ("model_config", "train_config", "parameters", "train_tokens", "val_nats_per_token", "seed")
    whole = [row for row in trained(results) if all(key in row for key in needed) and not diverged(row) and not row.get("pruned")]
    return [row for row in whole if {"hidden_size", "num_hidden_layers"} <= row["model_config"].keys()]


def law_tables(results: Mapping[str, Any]) -> list[Table]:
    """The losses by size and horizon, how far each model is from the first, and the law of each; nothing where there are fewer than two sizes or horizons."""
    points = points_of(results)
    everything = [each for some in points.values() for each in some]
    horizons = sorted({each.tokens for each in everything})
    sizes = list(dict.fromkeys(each.size for each in sorted(everything, key=lambda each: each.parameters)))
    if len(sizes) < 2 or len(horizons) < 2:
        return []
    lines: list[list[str]] = []
    first = next(iter(points))
    by_cell = {model: {(each.size, each.tokens): each for each in some} for model, some in points.items()}
    for model, cells in by_cell.items():
        for size in (each for each in sizes if any(there == each for there, _ in cells)):
            parameters = next(f"{each.parameters:,}" for (there, _), each in cells.items() if there == size)
            lines.append([model, size, parameters, *(f"{cells[size, t].loss:.4f}" if (size, t) in cells else "" for t in horizons)])
    for model, cells in list(by_cell.items())[1:]:
        for size in sizes:
            both = {t: cells[size, t].loss - by_cell[first][size, t].loss for t in horizons if (size, t) in cells and (size, t) in by_cell[first]}
            if both:
                lines.append([f"{model} − {first}", size, "", *(f"{both[t]:+.4f}" if t in both else "" for t in horizons)])
    columns = ["Model", "Width × layers", "Parameters", *(f"{t / 1e6:.3g} M tokens" for t in horizons)]
    said = Table(columns=columns, rows=lines, title="Validation loss at the end of each run (nats per token), by size and tokens")
    laws = [_law_line(model, some) for model, some in points.items()]
    note = (
        "L = E + A·N^−α + B·T^−β (arXiv 2203.15556) by least squares in nats; N counts all parameters, T the training tokens. The last column is the largest run, "
        "measured − predicted by the law of all others."
    )
    columns = ["Model", "Runs", "E", "α", "β", "Largest residual", "Largest run"]
    return [said, Table(columns=columns, rows=laws, title="The scaling law of each model", note=note)]


def _law_line(model: str, points: Sequence[Point]) -> list[str]:
    law = fit_law(points)
    if law is None:
        return [model, str(len(points)), *["not determined"] * 3, "", ""]
    largest = max(points, key=lambda each: each.parameters * each.tokens)
    others = fit_law([each for each in points if each is not largest])
    ahead = "not determined" if others is None else f"{largest.loss - others.loss(largest.parameters, largest.tokens):+.4f}"
    residual = max(law.residuals, key=abs)
    return [model, str(len(points)), f"{law.floor:.3f}", f"{law.alpha:.3f}", f"{law.beta:.3f}", f"{residual:+.4f}", ahead]


def law_plots(results: Mapping[str, Any], into: Path) -> list[Path]:
    """The loss at the end of each run against its tokens, and against its seconds where speed was measured; a line for each model and size.

    Args:
        results: content of a results.json.
        into: folder of the pictures.

    Returns:
        The pictures; none where there are fewer than two horizons of one model and size.
    """
    points = points_of(results)
    several = len({each.size for some in points.values() for each in some}) > 1
    pictures = []
    for stem, label, x_of in (
        ("loss_by_tokens", "training tokens (millions)", lambda each: each.tokens / 1e6),
        ("loss_by_seconds", "seconds of training", lambda each: each.seconds),
    ):
        curves: dict[str, dict[float, float]] = {}
        for model, some in points.items():
            for each in some:
                if (x := x_of(each)) is not None:
                    curves.setdefault(f"{model} {each.size}" if several else model, {})[x] = each.loss
        if not any(len(curve) > 1 for curve in curves.values()):
            continue
        figure, axes = new_figure(5.0)
        powers_of_two(axes)
        lines = Lines(axes)
        for name, curve in curves.items():
            lines.add(name, curve)
        lines.name()
        axes.set_xlabel(label)
        axes.set_ylabel("validation loss (nats per token)")
        axes.set_title("Loss at the end of each run", loc="left")
        pictures += save(figure, into / stem)
    return pictures
