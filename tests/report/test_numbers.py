from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.evaluation.statistics import Interval
from align.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.6931, "0.693"),
        (-41.23, "−41.2"),
        (0.00045, "4.5e−4"),
        (12_345, "12.3k"),
        (3e6, "3M"),
        (1234, "1234"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert numbers.short(value) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_short_says_when_there_is_no_number(value: float) -> None:
    assert numbers.short(value) == "not finite"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.712, 0.6903, 0.7334, 9), "0.690–0.733"),
        (Interval(33.2, 31.1, 35.4, 9), "31.1–35.4"),
        (Interval(0.05, -0.031, 0.12, 9), "−0.031 to 0.120"),
        (Interval(0.0, -0.0004, 0.0, 9), "−0.00040 to 0.00000"),
        (Interval(1.0, 1.0, 1.0, 9), "1.00–1.00"),
        (Interval(0.0, 0.0, 0.0, 9), "0.000–0.000"),
        (Interval(5200.0, 4100.0, 6300.0, 9), "4,100–6,300"),
    ],
)
def test_spans_show_two_digits_of_their_width(interval: Interval, text: str) -> None:
    assert numbers.span(interval) == text


def test_no_negative_zero() -> None:
    assert numbers.fixed(-0.0004, 2) == "0.00"


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 8))
def test_ticks_are_even_and_enclose(low: float, high: float, count: int) -> None:
    low, high = sorted((low, high))
    if 0 < high - low < 1e-9 * max(abs(low), abs(high)):
        return  # closer than tick labels can tell apart
    marks = numbers.ticks(low, high, count)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step
    assert marks[-1] >= high - 1e-6 * step
    assert 2 <= len(marks) <= 2 * count + 2
    assert all(math.isclose(b - a, step, rel_tol=1e-6) for a, b in pairwise(marks))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 0.001, ["0", "2e−4", "4e−4", "6e−4", "8e−4", "1e−3"]),
        (-1.3, 0.9, ["−1.5", "−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (19_100, 21_900, ["19k", "20k", "21k", "22k"]),
        (0, 20_000, ["0", "5k", "10k", "15k", "20k"]),
        (3, 3, ["1", "2", "3", "4", "5"]),
    ],
)
def test_tick_labels(low: float, high: float, labels: list[str]) -> None:
    assert numbers.tick_labels(numbers.ticks(low, high)) == labels


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (725, "12 min 5 s"), (10_921, "3 h 2 min")])
def test_duration(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(900, "900 B"), (1536, "1.5 KiB"), (1_340_000_000, "1.2 GiB"), (2**45, "32.0 TiB")]
)
def test_size(amount: int, text: str) -> None:
    assert numbers.size(amount) == text


@pytest.mark.parametrize(
    "value",
    [None, 3.0, {}, {"mean": 1, "low": 0, "high": math.nan, "n": 3}, {"mean": "x", "low": 0, "high": 1, "n": 3}],
)
def test_what_is_no_interval_is_none(value: object) -> None:
    assert numbers.as_interval(value) is None


@pytest.mark.parametrize(
    ("key", "text"), [("learning_rate", "Learning rate"), ("rewards/margin", "Rewards · margin"), ("", "")]
)
def test_heading(key: str, text: str) -> None:
    assert numbers.heading(key) == text
