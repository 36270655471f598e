from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.evaluation import statistics
from align.evaluation.statistics import Interval, bootstrap_mean, paired_difference, win_rate

Z95 = 1.959964


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng, n: rng.normal(3.0, 2.0, n), 3.0),
        (lambda rng, n: (rng.random(n) < 0.3).astype(float), 0.3),
        (lambda rng, n: rng.exponential(1.5, n), 1.5),
    ],
    ids=["normal", "bernoulli", "exponential"],
)
def test_interval_covers_the_true_mean_as_often_as_promised(
    draw: Callable[[np.random.Generator, int], np.ndarray], truth: float
) -> None:
    rng, trials = np.random.default_rng(7), 600
    covered = sum(
        not bootstrap_mean(draw(rng, 100), confidence=0.9, resamples=400, seed=trial).excludes(truth)
        for trial in range(trials)
    )
    # 0.9 with a standard error of 0.012 over trials, less the bootstrap's own small-sample loss (0.5 to 2 points here).
    assert 0.86 < covered / trials < 0.935


def test_interval_of_a_normal_sample_is_its_closed_form() -> None:
    values = np.random.default_rng(0).normal(10.0, 4.0, 400)
    interval = bootstrap_mean(values, resamples=20_000)
    half = Z95 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_bounds_are_quantiles_of_the_exact_bootstrap_distribution() -> None:
    values = [0.0, 1.0, 5.0]
    exact = np.sort([np.mean(draw) for draw in product(values, repeat=3)])
    interval = bootstrap_mean(values, confidence=0.8, resamples=50_000, seed=3)
    # The 27 equally likely resamples have atoms: the 10 % and 90 % points fall inside one each.
    assert interval.low == pytest.approx(exact[int(0.1 * 27)])
    assert interval.high == pytest.approx(exact[int(0.9 * 27)])


def test_paired_difference_is_the_mean_of_differences_and_narrower_than_apart() -> None:
    rng = np.random.default_rng(1)
    easy = rng.normal(0.0, 10.0, 200)
    ours, theirs = easy + rng.normal(0.5, 1.0, 200), easy + rng.normal(0.0, 1.0, 200)
    paired = paired_difference(ours, theirs)
    assert paired.mean == pytest.approx(ours.mean() - theirs.mean())
    half = Z95 * (ours - theirs).std() / math.sqrt(200)
    assert paired.high - paired.low == pytest.approx(2 * half, rel=0.1)
    assert paired.high - paired.low < (bootstrap_mean(ours).high - bootstrap_mean(ours).low) / 5


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
        min_size=1,
        max_size=40,
    )
)
def test_win_rates_of_two_sides_add_to_one(scores: list[tuple[int, int]]) -> None:
    ours, theirs = ([float(pair[side]) for pair in scores] for side in (0, 1))
    forward, backward = win_rate(ours, theirs, resamples=200), win_rate(theirs, ours, resamples=200)
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    ties = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert forward.mean == pytest.approx((wins + ties / 2) / len(scores))
    assert forward.mean + backward.mean == pytest.approx(1.0)
    assert forward.low + backward.high == pytest.approx(1.0)
    assert 0.0 <= forward.low <= forward.mean <= forward.high <= 1.0


def test_all_ties_is_one_half_for_sure() -> None:
    assert win_rate([2.0] * 5, [2.0] * 5) == Interval(0.5, 0.5, 0.5, 5)


@pytest.mark.parametrize("value", [0.1, -7.3e9, 0.0])
@pytest.mark.parametrize("n", [1, 2, 37])
def test_a_constant_has_no_width(value: float, n: int) -> None:
    interval = bootstrap_mean([value] * n)
    assert interval.low == interval.mean == interval.high == pytest.approx(value)
    assert interval.n == n


def test_same_seed_same_interval_other_seed_another() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_more_confidence_is_wider() -> None:
    values = np.random.default_rng(2).normal(size=50)
    narrow, wide = bootstrap_mean(values, confidence=0.8), bootstrap_mean(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_chunks_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=64)
    whole = bootstrap_mean(values, resamples=100)
    monkeypatch.setattr(statistics, "CHUNK_DRAWS", 64 * 7)
    assert bootstrap_mean(values, resamples=100) == whole


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([[1.0], [2.0]]),
        lambda: bootstrap_mean([1.0, math.nan]),
        lambda: bootstrap_mean([1.0, math.inf]),
        lambda: bootstrap_mean([1.0], confidence=1.0),
        lambda: bootstrap_mean([1.0], resamples=0),
        lambda: paired_difference([1.0, 2.0], [1.0]),
        lambda: win_rate([1.0], [1.0, 2.0]),
    ],
    ids=["empty", "matrix", "nan", "inf", "confidence", "resamples", "lengths", "win lengths"],
)
def test_what_has_no_interval_is_refused(call: Callable[[], Interval]) -> None:
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize(("value", "outside"), [(0.9, True), (1.0, False), (2.0, False), (3.0, False), (3.1, True)])
def test_excludes(value: float, outside: bool) -> None:
    assert Interval(2.0, 1.0, 3.0, 9).excludes(value) is outside
