"""A line chart as SVG that follows the page's colours, for pages that a plain installation writes: it needs no matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 112, 26, 44
"""Room for the numbers of the axes and the names of the lines."""

LINE_HEIGHT = 15


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    marked: bool = False
    """Whether each point has a dot."""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most ``most`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(each for each in (1, 2, 5, 10, 20) if math.floor(high / (each * step)) - math.ceil(low / (each * step)) < most)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(lines: Sequence[Line], x: str, y: str, label: str, *, across: Mapping[str, float] | None = None, doubling: bool = False) -> str:
    """The chart as an element of a page.

    Args:
        lines: at least one, each with at least one point.
        x: what the horizontal axis counts, with its unit.
        y: the vertical one, likewise.
        label: what a screen reader says of the picture.
        across: heights of dashed lines by name; those far from all points would press them together and are left out.
        doubling: whether each step of the horizontal axis doubles what it counts, which is above 0.
    """
    if doubling:
        lines = [replace(line, points=[(math.log2(px), py) for px, py in line.points]) for line in lines]
    xs, ys = [px for line in lines for px, _ in line.points], [py for line in lines for _, py in line.points]
    margin = (max(ys) - min(ys)) / 2 or 0.5
    near = {name: value for name, value in (across or {}).items() if min(ys) - margin <= value <= max(ys) + margin}
    low, high = min([*ys, *near.values()]), max([*ys, *near.values()])
    low, high = low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)
    first, last = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)

    def place(px: float, py: float) -> tuple[float, float]:
        return LEFT + (px - first) / (last - first) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - (py - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" class="chart">']
    for value in ticks(low, high):
        _, at = place(first, value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/><text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in range(math.ceil(first), math.floor(last) + 1) if doubling else ticks(first, last):
        at, _ = place(value, low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{2**value if doubling else value:,.6g}</text>')
    ends = []
    for name, value in near.items():
        _, at = place(last, value)
        parts.append(f'<path class="across" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        ends.append((at, name, ""))
    for line in lines:
        places = [place(*point) for point in line.points]
        d = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(f'<path class="line" style="stroke:{line.colour}" d="{d}"/>')
        if line.marked:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" style="fill:{line.colour}"/>' for px, py in places]
        ends.append((places[-1][1], line.name, line.colour))
    below = -math.inf
    for at, name, colour in sorted(ends):
        below = max(at, below + LINE_HEIGHT)
        style = f' style="fill:{colour}"' if colour else ' class="quiet"'
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{below + 4:.1f}"{style}>{escape(name)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="quiet" x="{LEFT}" y="{HEIGHT - 8}">{escape(x)}</text><text class="quiet" x="2" y="12">{escape(y)}</text></svg>')
    return "".join(parts)
