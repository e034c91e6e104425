"""Pictures in one style: colour-blind safe, labelled at the lines themselves, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_lm.errors import MissingExtraError
from gam_lm.files import replacing
from gam_lm.report.rows import by_model, by_variant, common_curve, floor_name, floors, trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette (jfly.uni-koeln.de/color): told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
FAMILIES = (
    ("gam-paper", 5),
    ("gam-static", 0),
    ("gam-mean", 2),
    ("gam-delta", 3),
    ("transformer-paper", 4),
    ("transformer", 1),
    ("mamba-paper", 7),
    ("mamba", 6),
)
# Tol's muted palette (personal.sron.nl/~pault) for models of transformers, whose names are without end.
MUTED = ("#332288", "#882255", "#44AA99", "#117733", "#999933", "#CC6677", "#88CCEE", "#AA4499", "#DDCC77")
GREY = "#767676"


def colour(model: str) -> str:
    """The colour that a model has in every picture."""
    if model.startswith("hf:"):
        return MUTED[sum(model.encode()) % len(MUTED)]
    return next((COLOURS[i] for name, i in FAMILIES if model.startswith(name)), GREY)


def loss_curves(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Validation loss against training tokens, a line per model: the mean over its seeds, with their range as a band.

    Args:
        results: content of a results.json.
        stem: the pictures' path without its ending.

    Returns:
        The SVG and the PNG.
    """
    figure, axes = new_figure()
    ends = []
    for model, group in by_variant(trained(results)).items():
        curve = common_curve(group)
        if not curve:
            continue
        tokens, losses = np.array(list(curve)), np.array(list(curve.values())).T
        axes.fill_between(tokens / 1e6, losses.min(0), losses.max(0), color=colour(model), alpha=0.18, linewidth=0)
        axes.plot(tokens / 1e6, losses.mean(0), color=colour(model), marker="o", markersize=3.5)
        ends.append((tokens[-1] / 1e6, float(losses.mean(0)[-1]), model, colour(model)))
    for row in floors(results):
        axes.axhline(row["val_nats_per_token"], color=GREY, linestyle="--", linewidth=1)
        ends.append((ends[0][0] if ends else 1.0, row["val_nats_per_token"], floor_name(row), GREY))
    label_ends(axes, ends)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"{results['corpus']['name']}: same tokens, same order", loc="left")
    return save(figure, stem)


def new_figure(height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of the house's width, ``height`` inches high, with light axes. Raises MissingExtraError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "a plot") from error
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its end (x, y, name, colour), moved apart where they would touch."""
    if not ends:
        return
    logarithmic = axes.get_yscale() == "log"
    scale, back = (np.log, np.exp) if logarithmic else (np.asarray, np.asarray)  # distances as the eye sees them
    low, high = (float(scale(bound)) for bound in axes.get_ylim())
    gap = (high - low) * 0.055
    places: list[float] = []
    for x, y, name, shade in sorted(ends, key=lambda end: end[1]):
        height = float(scale(y))
        place = height if not places else max(height, places[-1] + gap)
        places.append(place)
        axes.annotate(
            name, (x, y), xytext=(1.02, float(back(place))), textcoords=axes.get_yaxis_transform(), color=shade, va="center", annotation_clip=False, fontsize=9
        )
    axes.set_ylim(float(back(low)), float(back(max(high, places[-1] + gap / 2))))


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.svg and ``stem``.png, the same bytes for the same picture."""
    import matplotlib as mpl

    paths = []
    for ending, extra in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
        path = stem.with_name(stem.name + ending)
        with mpl.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "none"}), replacing(path) as temporary:
            figure.savefig(temporary, format=ending[1:], facecolor="white", **extra)
        paths.append(path)
    return paths


def context_plots(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """What the files of ``gam eval --out`` allow: context use, loss by position, loss by context length. Returns the pictures."""
    pictures = []
    groups = by_model(results["rows"])
    used = {model: [row["context_use"] for row in rows if "context_use" in row] for model, rows in groups.items()}
    if any(used.values()):
        figure, axes = new_figure()
        ends = []
        for model, group in used.items():
            points = {int(d): [each["by_distance"][d] for each in group if each["by_distance"].get(d)] for d in (group[0]["by_distance"] if group else ())}
            points = {d: some for d, some in sorted(points.items()) if some}
            if points:
                gains = [float(np.mean([each["gain"] for each in some])) for some in points.values()]
                spread = [float(np.mean([each["half_width"] for each in some])) for some in points.values()]
                axes.errorbar(list(points), gains, yerr=spread, color=colour(model), marker="o", markersize=3.5, capsize=2)
                ends.append((float(max(points)), gains[-1], model, colour(model)))
        axes.set_xscale("log", base=2)
        label_ends(axes, ends)
        axes.set_xlabel("true tokens before the target, d")
        axes.set_ylabel("worth of the text before those (nats)")
        axes.set_title("Context use: loss with d true tokens over loss with all", loc="left")
        pictures += save(figure, directory / "context_use")

    figure, axes = new_figure()
    ends = []
    for model, rows in groups.items():
        shortest = min(len(row["position_nats"]) for row in rows)
        mean = np.mean([row["position_nats"][:shortest] for row in rows], 0)
        edges = np.unique(np.round(np.geomspace(1, shortest, 25)).astype(int))
        centres = [float(np.sqrt(low * high)) for low, high in zip(edges[:-1], edges[1:], strict=True)]
        binned = [float(mean[low - 1 : high - 1].mean()) for low, high in zip(edges[:-1], edges[1:], strict=True)]
        if binned:
            axes.plot(centres, binned, color=colour(model))
            ends.append((centres[-1], binned[-1], model, colour(model)))
    axes.set_xscale("log", base=2)
    label_ends(axes, ends)
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss by position", loc="left")
    pictures += save(figure, directory / "position")

    lengths = {model: [row["contexts"] for row in rows if row.get("contexts")] for model, rows in groups.items()}
    if any(lengths.values()):
        figure, axes = new_figure()
        ends = []
        for model, group in lengths.items():
            points = {int(n): [each[n] for each in group if each.get(n) is not None] for n in (group[0] if group else ())}
            points = {n: some for n, some in sorted(points.items()) if some}
            if points:
                means = [float(np.mean(some)) for some in points.values()]
                axes.plot(list(points), means, color=colour(model), marker="o", markersize=3.5)
                ends.append((float(max(points)), means[-1], model, colour(model)))
        axes.set_xscale("log", base=2)
        label_ends(axes, ends)
        axes.set_xlabel("context length in evaluation (tokens)")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title("Beyond the training length", loc="left")
        pictures += save(figure, directory / "length")
    return pictures


def receptive_field_plot(effects: Mapping[int, float], stem: Path) -> list[Path]:
    """The effect of one changed token on the last prediction, by its distance. Returns the SVG and the PNG."""
    figure, axes = new_figure()
    distances = [distance + 1 for distance in effects]
    seen = [(d, effect) for d, effect in zip(distances, effects.values(), strict=True) if effect > 0]
    axes.plot([d for d, _ in seen], [effect for _, effect in seen], color=COLOURS[0], marker="o", markersize=3.5, linestyle="none")
    for d in distances:
        if d not in {each for each, _ in seen}:
            axes.axvline(d, color=GREY, alpha=0.25, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(0.8, max(distances) * 1.25)
    axes.set_xlabel("tokens back (1 is the current one); grey: no effect at all")
    axes.set_ylabel("effect on the prediction (nats)")
    axes.set_title("Receptive field", loc="left")
    return save(figure, stem)
