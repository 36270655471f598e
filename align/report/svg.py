"""The little of SVG that the plots need: elements that escape what they hold, and a frame with axes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from align.report.numbers import tick_labels, ticks

COLOURS = 7
"""Classes c0 ... c6 of the style sheet; more series than that begin again."""


def canvas(width: float, height: float, label: str) -> ET.Element:
    """An empty drawing that scales to the width it is given, read out as `label`."""
    root = ET.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label})
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    return root


def add(parent: ET.Element, tag: str, kind: str = "", text: str | None = None, **attributes: float | str) -> ET.Element:
    """Append an element.

    Args:
        parent: Where to.
        tag: Its name.
        kind: Its classes.
        text: Its text.
        **attributes: Numbers are shortened; `_` in a name stands for `-`.
    """
    values = {name.replace("_", "-"): _short(value) for name, value in attributes.items()}
    element = ET.SubElement(parent, tag, {"class": kind, **values} if kind else values)
    element.text = text
    return element


def tip(element: ET.Element, text: str) -> None:
    """What a browser shows while the pointer rests on the element."""
    ET.SubElement(element, "title").text = text


def markup(root: ET.Element) -> str:
    """The drawing as text that a page may take as it is: ElementTree has escaped what came from outside."""
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def colour(index: int) -> str:
    """The class that colours series number `index`."""
    return f"c{index % COLOURS}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] of the data to pixels; `marks` are its ticks."""

    low: float
    high: float
    start: float
    end: float
    marks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, count: int = 5, *, snug: bool = False) -> Scale:
        """A scale that holds all values: out to round numbers, or (snug) just them with the round numbers inside."""
        low, high = min(values), max(values)
        marks = ticks(low, high, count)
        if not snug or low == high:
            return cls(marks[0], marks[-1], start, end, tuple(marks))
        slack = (high - low) * 1e-9
        return cls(low, high, start, end, tuple(m for m in marks if low - slack <= m <= high + slack))

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def labelled(self) -> list[tuple[float, str]]:
        """Tick positions and their labels."""
        labels = tick_labels(self.marks) if len(self.marks) > 1 else [f"{m:g}" for m in self.marks]
        return list(zip(map(self, self.marks), labels, strict=True))


def axes(root: ET.Element, x: Scale, y: Scale, x_label: str, y_label: str = "") -> None:
    """Gridlines, tick labels, the base line and what the axes show."""
    for at, label in y.labelled():
        add(root, "line", "grid", x1=x.start, x2=x.end, y1=at, y2=at)
        add(root, "text", "tick end", label, x=x.start - 6, y=at + 3.5)
    for at, label in x.labelled():
        add(root, "line", "axis", x1=at, x2=at, y1=y.start, y2=y.start + 4)
        add(root, "text", "tick middle", label, x=at, y=y.start + 15)
    add(root, "line", "axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start)
    add(root, "text", "label middle", x_label, x=(x.start + x.end) / 2, y=y.start + 31)
    if y_label:
        middle = (y.start + y.end) / 2
        add(root, "text", "label middle", y_label, x=12, y=middle, transform=f"rotate(-90 12 {middle:g})")


MARKERS = ("circle", "square", "diamond", "triangle", "wedge")


def marker(parent: ET.Element, shape: int, kind: str, x: float, y: float, radius: float = 4.5) -> ET.Element:
    """A point whose shape tells series apart where colour does not."""
    name, r = MARKERS[shape % len(MARKERS)], radius
    if name == "circle":
        return add(parent, "circle", kind, cx=x, cy=y, r=r)
    if name == "square":
        return add(parent, "rect", kind, x=x - 0.9 * r, y=y - 0.9 * r, width=1.8 * r, height=1.8 * r)
    corners = {
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        "wedge": [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
    }[name]
    return add(parent, "polygon", kind, points=" ".join(f"{x + r * dx:.2f},{y + r * dy:.2f}" for dx, dy in corners))
