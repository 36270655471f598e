from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from align.evaluation.statistics import Interval
from align.report.plots import HEIGHT, MOST_POINTS, WIDTH, Point, Series, interval_plot, line_plot, scatter_plot


def elements(svg: str, tag: str, kind: str = "") -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if kind in e.get("class", "").split() or not kind]


def points_of(line: ET.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]


def test_a_line_runs_where_the_axes_say() -> None:
    svg = line_plot([Series("training", ((0, 1.0), (50, 3.0), (100, 2.0)))], title="Loss")
    (line,) = elements(svg, "polyline", "line")
    ticks = {e.text: float(e.get("y", "nan")) - 3.5 for e in elements(svg, "text", "end")}
    heights = [y for _, y in points_of(line)]
    assert heights == pytest.approx([ticks["1.0"], ticks["3.0"], ticks["2.0"]], abs=0.1)
    xs = [x for x, _ in points_of(line)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)


def test_everything_stays_inside() -> None:
    rng = np.random.default_rng(0)
    values = tuple((float(i), float(v)) for i, v in enumerate(rng.normal(0, 1e5, 80)))
    svg = line_plot([Series("a", values), Series("b", values[::2], 1, dashed=True)], title="t")
    for x, y in (p for line in elements(svg, "polyline") for p in points_of(line)):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_values_that_are_not_finite_break_the_line() -> None:
    points = ((0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 2.0), (5, 1.0))
    svg = line_plot([Series("a", points)], title="t")
    assert [len(points_of(line)) for line in elements(svg, "polyline", "line")] == [2, 2]
    assert "nan" not in svg
    assert "inf" not in svg


@pytest.mark.parametrize("points", [((5, 0.3),), ((5, 0.3), (9, 0.3))], ids=["one point", "flat"])
def test_a_short_series_shows_its_points(points: tuple[tuple[float, float], ...]) -> None:
    svg = line_plot([Series("a", points)], title="t")
    assert len(elements(svg, "circle", "mark")) == len(points)


def test_thinning_keeps_spikes() -> None:
    values = [(float(i), 1.0) for i in range(20_000)]
    values[12_345] = (12_345.0, 99.0)
    (line,) = elements(line_plot([Series("a", tuple(values))], title="t"), "polyline", "line")
    drawn = points_of(line)
    assert len(drawn) <= MOST_POINTS + 2
    assert min(y for _, y in drawn) < 30


def test_end_labels_do_not_cover_each_other() -> None:
    lines = [Series(str(i), ((0, 1.0), (1, 1.0 + i * 1e-4)), i) for i in range(4)]
    labels = [float(e.get("y", "nan")) for e in elements(line_plot(lines, title="t"), "text", "value")]
    gaps = np.diff(sorted(labels))
    assert min(gaps) >= 11.9
    assert max(labels) < HEIGHT


def test_scatter_bars_span_the_intervals() -> None:
    points = [
        Point("sft", Interval(0.0, 0.0, 0.0, 9), Interval(0.5, 0.4, 0.6, 9)),
        Point("dpo", Interval(4.0, 3.0, 5.0, 9), Interval(0.7, 0.6, 0.8, 9)),
    ]
    svg = scatter_plot(points, title="t", x_label="KL", y_label="gold", baseline="sft")
    sft, dpo = [list(group.iter("line")) for group in elements(svg, "g")]
    width = lambda bar, a: float(bar.get(f"{a}2")) - float(bar.get(f"{a}1"))  # noqa: E731
    assert width(sft[0], "x") == 0
    assert width(dpo[0], "x") > 0
    assert width(dpo[1], "y") == pytest.approx(width(sft[1], "y"), abs=0.1)
    (reference,) = elements(svg, "line", "reference")
    assert reference.get("y1") == sft[0].get("y1")


def test_interval_rows_carry_their_figures() -> None:
    rows = [("sft", Interval(0.5, 0.48, 0.52, 9)), ("한국어 <b>", Interval(0.7, 0.68, 0.72, 9))]
    svg = interval_plot(rows, title="t", decimals=2, baseline="sft")
    texts = [e.text for e in elements(svg, "tspan")]
    assert texts == ["0.50", "0.48–0.52", "0.70", "0.68–0.72"]
    assert [e.text for e in elements(svg, "text", "name")] == ["sft", "한국어 <b>"]
    assert "&lt;b&gt;" in svg


def test_shapes_tell_series_apart_without_colour() -> None:
    same = Interval(0.5, 0.4, 0.6, 9)
    svg = scatter_plot(
        [Point(str(i), same, same) for i in range(5)], title="t", x_label="x", y_label="y", baseline=None
    )
    shapes = {
        (e.tag, e.get("points") and len(e.get("points", "").split()), e.get("points"))
        for e in ET.fromstring(svg).iter()
        if "mark" in e.get("class", "").split()
    }
    assert len(shapes) == 5


@pytest.mark.parametrize("crowd", [2, 4])
def test_scatter_names_cover_neither_points_nor_each_other(crowd: int) -> None:
    near = [Interval(4.0 + 0.1 * i, 3.9, 4.6, 9) for i in range(crowd)]
    corner = Interval(9.0, 8.0, 9.1, 9)
    points = [Point(f"method-{i}", at, at) for i, at in enumerate(near)] + [Point("at-the-edge", corner, corner)]
    svg = scatter_plot(points, title="t", x_label="x", y_label="y", baseline=None)
    names = elements(svg, "text", "value")
    boxes = [(float(e.get("x", 0)), float(e.get("y", 0)), 7.6 * len(e.text or "")) for e in names]
    for i, (x, y, w) in enumerate(boxes):
        assert 0 <= x <= x + w <= 480
        for x2, y2, w2 in boxes[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or abs(y - y2) >= 11
