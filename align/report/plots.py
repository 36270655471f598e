"""Plots as inline SVG: lines over steps, points with interval bars, rows of intervals, and how sure against how right.

Colours come from the page's style sheet, so that a plot follows the reader's light or dark setting; marker shapes and
dashes say the same again for readers who do not tell colours apart.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from align.evaluation.statistics import Interval
from align.report.numbers import fixed, short, span
from align.report.svg import Scale, add, axes, canvas, colour, marker, markup, tip

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 54, 12, 40
MOST_POINTS = 500
CHARACTER, BOLD_CHARACTER = 6.4, 7.6
"""Width of an average character of the labels, in pixels; wide enough for the wider system fonts."""


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: As the legend has it.
        points: (x, y) in order of x; a y that is not finite breaks the line.
        colour: Number of its colour.
        dashed: Drawn dashed with dots at its points: measured now and then, on held-out examples.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    dashed: bool = False

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass(frozen=True)
class Point:
    """One named point of a scatter plot, uncertain both ways."""

    name: str
    x: Interval
    y: Interval


def line_plot(series: Sequence[Series], *, title: str, x_label: str = "step") -> str:
    """Lines over a shared x, the last value written at the end of each.

    Args:
        series: At least one of them with a finite value.
        title: What a screen reader says.
        x_label: Under the x axis.
    """
    drawn = [s for s in series if s.finite]
    values = [y for s in drawn for _, y in s.finite]
    steps = [x for s in drawn for x, _ in s.finite]
    root = canvas(WIDTH, HEIGHT, title)
    x = Scale.over(steps, LEFT, WIDTH - RIGHT, snug=True)
    y = Scale.over(values, HEIGHT - BOTTOM, TOP)
    axes(root, x, y, x_label)
    for s in drawn:
        _line(root, s, x, y)
    ends = _spread([y(s.finite[-1][1]) for s in drawn], gap=12, low=TOP, high=HEIGHT - BOTTOM)
    for s, at in zip(drawn, ends, strict=True):
        add(root, "text", f"value {colour(s.colour)}", short(s.finite[-1][1]), x=x.end + 6, y=at + 3.5)
    return markup(root)


def scatter_plot(points: Sequence[Point], *, title: str, x_label: str, y_label: str, baseline: str | None) -> str:
    """Named points with interval bars both ways; a dashed line at the baseline's height.

    Args:
        points: At least one.
        title: What a screen reader says.
        x_label: Under the x axis.
        y_label: Beside the y axis.
        baseline: Name of the point that the others are compared with.
    """
    width, height = 480, 300
    root = canvas(width, height, title)
    x_values = [0.0, *(v for p in points for v in (p.x.low, p.x.high))]
    x = Scale.over(x_values, 62, width - 24)
    y = Scale.over([v for p in points for v in (p.y.low, p.y.high)], height - BOTTOM, TOP)
    axes(root, x, y, x_label, y_label)
    for p in points:
        if p.name == baseline:
            add(root, "line", "reference", x1=x.start, x2=x.end, y1=y(p.y.mean), y2=y(p.y.mean))
    for i, p in enumerate(points):
        group = add(root, "g", colour(i))
        tip(group, f"{p.name}: {y_label} {_told(p.y)}, {x_label} {_told(p.x)}")
        at_x, at_y = x(p.x.mean), y(p.y.mean)
        add(group, "line", "bar", x1=x(p.x.low), x2=x(p.x.high), y1=at_y, y2=at_y)
        add(group, "line", "bar", x1=at_x, x2=at_x, y1=y(p.y.low), y2=y(p.y.high))
        marker(group, i, "mark", at_x, at_y)
    anchors = [(x(p.x.mean), y(p.y.mean)) for p in points]
    names = [_cut(p.name) for p in points]
    for i, (at_x, at_y) in enumerate(_beside(anchors, [BOLD_CHARACTER * len(n) for n in names], width)):
        add(root, "text", f"value {colour(i)}", names[i], x=at_x, y=at_y + 4)
    return markup(root)


def reliability_plot(points: Sequence[tuple[float, float, int]], *, title: str) -> str:
    """How often a model is right against how sure it is; on the dashed diagonal the two agree.

    Args:
        points: (mean probability of its own choice, share that is right, number of pairs); at least one.
        title: What a screen reader says.
    """
    root = canvas(WIDTH, HEIGHT, title)
    x = Scale.over([0.5, 1.0], LEFT, WIDTH - RIGHT)
    y = Scale.over([0.5, 1.0, *(right for _, right, _ in points)], HEIGHT - BOTTOM, TOP)
    axes(root, x, y, "probability of its choice")
    add(root, "line", "reference", x1=x(0.5), x2=x(1.0), y1=y(0.5), y2=y(1.0))
    most = max(n for *_, n in points)
    for sure, right, n in points:
        group = add(root, "g", colour(0))
        tip(group, f"{fixed(sure, 2)} sure, {fixed(right, 2)} right, of {n} pairs")
        add(group, "line", "bar", x1=x(sure), x2=x(sure), y1=y(sure), y2=y(right))
        marker(group, 0, "mark", x(sure), y(right), radius=2.5 + 4 * math.sqrt(n / most))
    return markup(root)


def interval_plot(rows: Sequence[tuple[str, Interval]], *, title: str, decimals: int, baseline: str | None) -> str:
    """One row per name: its mean, its interval and both in figures; a dashed line at the baseline's mean.

    Args:
        rows: At least one; colours and shapes go by position, as in `scatter_plot`.
        title: What a screen reader says.
        decimals: Of the figures.
        baseline: Name of the row that the others are compared with.
    """
    width, step = 480, 34
    left = 14 + BOLD_CHARACTER * max(len(_cut(name)) for name, _ in rows)
    texts = [f"{fixed(i.mean, decimals)}  {span(i, decimals)}" for _, i in rows]
    right = 14 + CHARACTER * max(map(len, texts))
    bottom = TOP + step * len(rows)
    root = canvas(width, bottom + 28, title)
    x = Scale.over([v for _, i in rows for v in (i.low, i.high)], left, width - right, count=4)
    for at, label in x.labelled():
        add(root, "line", "grid", x1=at, x2=at, y1=TOP, y2=bottom)
        add(root, "text", "tick middle", label, x=at, y=bottom + 15)
    for name, interval in rows:
        if name == baseline:
            add(root, "line", "reference", x1=x(interval.mean), x2=x(interval.mean), y1=TOP, y2=bottom)
    for i, ((name, interval), text) in enumerate(zip(rows, texts, strict=True)):
        at = TOP + step * (i + 0.5)
        group = add(root, "g", colour(i))
        tip(group, f"{name}: {text} (n = {interval.n})")
        add(group, "line", "bar", x1=x(interval.low), x2=x(interval.high), y1=at, y2=at)
        marker(group, i, "mark", x(interval.mean), at)
        add(root, "text", "name end", _cut(name), x=left - 10, y=at + 4)
        mean = add(root, "text", "figure", x=width - right + 10, y=at + 4)
        add(mean, "tspan", "strong", fixed(interval.mean, decimals))
        add(mean, "tspan", "faint", span(interval, decimals), dx=6)
    return markup(root)


def _line(root: ET.Element, series: Series, x: Scale, y: Scale) -> None:
    kind = f"line {colour(series.colour)}" + (" dashed" if series.dashed else "")
    finite = series.finite
    for run in _runs(series.points):
        path = [f"{x(a):.1f},{y(b):.1f}" for a, b in _thinned(run)]
        if len(path) > 1:
            add(root, "polyline", kind, points=" ".join(path))
    if series.dashed or len(finite) <= 2:
        for a, b in finite if len(finite) <= 40 else finite[-1:]:
            dot = add(root, "circle", f"mark {colour(series.colour)}", cx=x(a), cy=y(b), r=2.6)
            tip(dot, f"{series.name} at {a:g}: {short(b)}")


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches between values that are not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS`: the lowest and highest of every bucket, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _spread(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as keeps labels `gap` apart, in their order, within [low, high] while there is room."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = list(positions)
    for previous, current in pairwise(order):
        placed[current] = max(placed[current], placed[previous] + gap)
    if order and placed[order[-1]] > high:
        placed[order[-1]] = high
        for following, current in pairwise(order[::-1]):
            placed[current] = min(placed[current], placed[following] - gap)
    return [max(low, at) for at in placed]


def _beside(anchors: Sequence[tuple[float, float]], widths: Sequence[float], right: float) -> list[tuple[float, float]]:
    """Where names stand so that they cover no point and no other name: left edge and middle of each.

    Each takes the best of eight places around its point, counting what it would cover; the first of equals wins.
    """
    half = 7.0
    taken = [(x - half, y - half, x + half, y + half) for x, y in anchors]
    placed = []
    for (x, y), width in zip(anchors, widths, strict=True):
        beside = [(x + 10, y - 9), (x + 10, y + 10), (x - 10 - width, y - 9), (x - 10 - width, y + 10)]
        around = [(x - width / 2, y - 17), (x - width / 2, y + 18), (x + 14, y), (x - 14 - width, y)]
        best = min(beside + around, key=lambda at: _covered(at, width, taken, right))
        placed.append(best)
        taken.append((best[0], best[1] - half, best[0] + width, best[1] + half))
    return placed


def _covered(
    at: tuple[float, float], width: float, taken: Sequence[tuple[float, float, float, float]], right: float
) -> float:
    """Area in square pixels that a name would share with others or lose beyond the edge."""
    x1, y1, x2, y2 = at[0], at[1] - 7, at[0] + width, at[1] + 7
    shared = (max(0.0, min(x2, b[2]) - max(x1, b[0])) * max(0.0, min(y2, b[3]) - max(y1, b[1])) for b in taken)
    outside = max(0.0, 62 - x1) + max(0.0, x2 - right)
    return sum(shared) + 14 * outside


def _told(interval: Interval) -> str:
    return f"{short(interval.mean)} ({short(interval.low)} to {short(interval.high)})"


def _cut(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
