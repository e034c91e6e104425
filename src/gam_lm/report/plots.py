"""Pictures in one style: colour-blind safe, labelled at the lines themselves, as SVG and PNG."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import adler32

import numpy as np

from gam_lm.errors import MissingExtraError
from gam_lm.presets.models import MODELS
from gam_lm.report.compare import diverged
from gam_lm.report.rows import by_model, by_variant, common_curve, floor_name, floors, trained
from gam_lm.runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette (jfly.uni-koeln.de/color) and Tol's muted one (personal.sron.nl/~pault): told apart with any colour vision.
COLOURS = (
    "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#332288", "#661100", "#44AA99", "#999933", "#D55E00", "#E69F00", "#882255", "#CC6677", "#117733", "#000000", "#AA4499",
)  # fmt: skip
"""Of the named models, in their order."""
# D3's category20b, for models that others name.
FURTHER = ("#393B79", "#637939", "#8C6D31", "#843C39", "#7B4173", "#5254A3", "#8CA252", "#BD9E39", "#AD494A", "#A55194")
GREY = "#767676"
LINE = "line-of-"
"""Starts the id that each named line has in an SVG."""
WIDTH = 7.2
"""Of a picture, in inches."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^v"


def colour(model: str) -> str:
    """The colour that a model has in every picture: the one of the named model with which its name begins, or else one by its own name."""
    name = known(model)
    return FURTHER[adler32(model.encode()) % len(FURTHER)] if name is None else COLOURS[list(MODELS).index(name)]


def known(model: str) -> str | None:
    """The longest name of a named model with which ``model`` begins, as far as there is a colour for it: changes or a run's seed may follow."""
    begins = [name for name in list(MODELS)[: len(COLOURS)] if re.match(rf"{re.escape(name)}(?!\w)", model)]
    return max(begins, key=len, default=None)


class Lines:
    """The lines of one picture, each named at its end.

    A line has its model's colour; lines of one colour differ in dash and marker. Give the points first and the scales of the axes before `name`.
    """

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._ends: list[tuple[float, float, str, str]] = []
        self._of_colour: Counter[str] = Counter()

    def add(
        self, name: str, points: Mapping[float, float], *, band: Mapping[float, tuple[float, float]] | None = None, note: str = "",
        joined: bool = True, marked: bool = True,
    ) -> None:  # fmt: skip
        """Draw a line.

        Args:
            name: the model's, and what tells this line from others of it.
            points: y by x, at least one.
            band: the least and the greatest y at each x, drawn as a band.
            note: what the name at the end says besides.
            joined: whether the points are joined.
            marked: whether each point has a marker.
        """
        shade, places = colour(name), sorted(points)
        nth = self._of_colour[shade] + (known(name) is None)  # a colour by name may come near another
        self._of_colour[shade] += 1
        style: dict[str, Any] = {"color": shade, "linestyle": DASHES[nth % len(DASHES)] if joined else "none"}
        if marked:
            style |= {"marker": MARKERS[nth % len(MARKERS)], "markersize": 3.5}
        if band:
            least, most = ([band[place][end] for place in places] for end in (0, 1))
            self.axes.fill_between(places, least, most, color=shade, alpha=0.18, linewidth=0)
            self.axes.vlines(places, least, most, color=shade, alpha=0.5, linewidth=2)  # seen where a line has one place only
        self.axes.plot(places, [points[place] for place in places], gid=f"{LINE}{len(self._ends)}", **style)
        self._ends.append((float(places[-1]), float(points[places[-1]]), name + note, shade))

    def across(self, y: float, name: str) -> None:
        """Draw a dashed grey line across the picture."""
        self.axes.axhline(y, color=GREY, linestyle="--", linewidth=1, gid=f"{LINE}{len(self._ends)}")
        self._ends.append((self._ends[0][0] if self._ends else 1.0, y, name, GREY))

    def name(self) -> None:
        """Write each line's name beside its end, and widen the picture for long ones."""
        longest = max((len(name) for _, _, name, _ in self._ends), default=0)
        figure = self.axes.get_figure(root=True)
        assert figure is not None
        figure.set_figwidth(WIDTH + 0.07 * max(0, longest - 24))
        label_ends(self.axes, self._ends)


def loss_curves(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Validation loss against training tokens, a line per model: the mean over its seeds, with their range as a band.

    A counting floor is drawn where it lies near the curves; far from them it would press them together, and stands in the table.

    Args:
        results: content of a results.json.
        stem: the pictures' path without its ending.

    Returns:
        The SVG and the PNG.
    """
    figure, axes = new_figure()
    lines = Lines(axes)
    seen = []
    for model, group in by_variant(trained(results)).items():
        curve = {tokens / 1e6: losses for tokens, losses in common_curve(row for row in group if not diverged(row)).items()}
        if curve:
            lines.add(model, {x: float(np.mean(y)) for x, y in curve.items()}, band={x: (min(y), max(y)) for x, y in curve.items()})
            seen += [loss for losses in curve.values() for loss in losses]
    margin = (max(seen) - min(seen)) / 2 if seen else float("inf")
    for row in floors(results):
        if not seen or min(seen) - margin <= row["val_nats_per_token"] <= max(seen) + margin:
            lines.across(row["val_nats_per_token"], floor_name(row))
    lines.name()
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
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def powers_of_two(axes: Axes) -> None:
    """Make the x axis logarithmic, its ticks powers of two, written out."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_written_out)


def decades(axes: Axes) -> None:
    """Make the y axis logarithmic, its ticks written out: powers of ten, and times those where the data span few, so that at least two stand there. Draw the lines first."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    chosen: Locator = MaxNLocator(4)
    for subs in (1,), (1, 2, 5), tuple(range(1, 10)):
        locator = LogLocator(subs=subs)
        if sum(low <= each <= high for each in locator.tick_values(low, high)) >= 3:
            chosen = locator
            break
    axes.yaxis.set_major_locator(chosen)
    axes.yaxis.set_major_formatter(_written_out)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _written_out(value: float, _: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its end (x, y, name, colour), moved apart where they would touch, with a thin line to where it belongs."""
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
            name, (x, y), xytext=(1.03, float(back(place))), textcoords=axes.get_yaxis_transform(), color=shade, va="center", annotation_clip=False, fontsize=9,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip
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
    groups = by_model(results["rows"])
    used = {model: [_by_distance(row["context_use"]) for row in rows if "context_use" in row] for model, rows in groups.items()}
    lengths = {model: [{float(n): nats for n, nats in row["contexts"].items()} for row in rows if row.get("contexts")] for model, rows in groups.items()}
    positions = {model: _binned([row["position_nats"] for row in rows]) for model, rows in groups.items()}
    gains = {model: _means([{d: each["gain"] for d, each in by_distance.items()} for by_distance in some]) for model, some in used.items()}
    spread = {model: _means([{d: each["half_width"] for d, each in by_distance.items()} for by_distance in some]) for model, some in used.items()}
    bands = {model: {d: (gain - spread[model][d], gain + spread[model][d]) for d, gain in some.items()} for model, some in gains.items()}
    title = "Context use: loss with d true tokens over loss with all"
    pictures = _against_tokens(gains, "true tokens before the target, d", "worth of the text before those (nats)", title, directory / "context_use", bands=bands)
    pictures += _against_tokens(positions, "tokens read before", "loss (nats per token)", "Loss by position", directory / "position", marked=False)
    label = "context length in evaluation (tokens)"
    means = {model: _means(rows) for model, rows in lengths.items()}
    return pictures + _against_tokens(means, label, "loss (nats per token)", "Beyond the training length", directory / "length")


def _against_tokens(
    curves: Mapping[str, Mapping[float, float]], x: str, y: str, title: str, stem: Path, *,
    bands: Mapping[str, Mapping[float, tuple[float, float]]] | None = None, marked: bool = True,
) -> list[Path]:  # fmt: skip
    """A line per model over numbers of tokens, on a logarithmic axis; no picture where no model has a point."""
    if not any(curves.values()):
        return []
    figure, axes = new_figure()
    powers_of_two(axes)
    lines = Lines(axes)
    for model, points in curves.items():
        if points:
            lines.add(model, points, band=bands[model] if bands else None, marked=marked)
    lines.name()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left")
    return save(figure, stem)


def _by_distance(measured: Mapping[str, Any]) -> dict[float, Mapping[str, float]]:
    """What was found at each number of true tokens; not at the whole context, where it is 0 for every model by definition."""
    return {float(d): each for d, each in measured["by_distance"].items() if each and int(d) < measured["context"]}


def _means(curves: Sequence[Mapping[float, float | None]]) -> dict[float, float]:
    """The mean of several curves at each place of any, over those that have a figure there."""
    places = sorted({place for each in curves for place in each})
    known = {place: [value for each in curves if (value := each.get(place)) is not None] for place in places}
    return {place: float(np.mean(values)) for place, values in known.items() if values}


def _binned(curves: Sequence[Sequence[float]]) -> dict[float, float]:
    """The mean of several losses by position, in bins of equal width to the eye on a logarithmic axis."""
    shortest = min(map(len, curves))
    mean = np.mean([each[:shortest] for each in curves], 0)
    edges = np.unique(np.round(np.geomspace(1, shortest, 25)).astype(int))
    return {float(np.sqrt(low * high)): float(mean[low - 1 : high - 1].mean()) for low, high in pairwise(edges)}


def receptive_field_plot(effects: Mapping[int, float], stem: Path) -> list[Path]:
    """The effect of one changed token on the last prediction, by its distance. Returns the SVG and the PNG."""
    figure, axes = new_figure()
    distances = [distance + 1 for distance in effects]
    seen = [(d, effect) for d, effect in zip(distances, effects.values(), strict=True) if effect > 0]
    axes.plot([d for d, _ in seen], [effect for _, effect in seen], color=COLOURS[0], marker="o", markersize=3.5, linestyle="none")
    for d in distances:
        if d not in {each for each, _ in seen}:
            axes.axvline(d, color=GREY, alpha=0.25, linewidth=0.8)
    powers_of_two(axes)
    axes.set_yscale("log")
    axes.set_xlim(0.8, max(distances) * 1.25)
    axes.set_xlabel("tokens back (1 is the current one); grey: no effect at all")
    axes.set_ylabel("effect on the prediction (nats)")
    axes.set_title("Receptive field", loc="left")
    return save(figure, stem)
