"""Means over prompts with bootstrap intervals: how far another draw of prompts would move a number.

Shape letters: N prompts, R resamples. All functions resample prompts, so two numbers of the same N and seed are
resampled alike, and a paired difference keeps what the two have in common.
*Source*: percentile bootstrap, Efron 1979 (doi:10.1214/aos/1176344552). It covers a little less than promised below
about 30 prompts, and says nothing of what was never drawn: 20 successes in 20 trials come out as 1 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK_DRAWS = 2**22
"""Most indices drawn at once (32 MiB)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds that its bootstrap resamples stay within.

    Attributes:
        mean: Mean of the values, in their unit.
        low: Lower bound at the confidence asked for.
        high: Upper bound.
        n: Number of values, that is of prompts.
    """

    mean: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the bounds."""
        return value < self.low or value > self.high

    def to_dict(self) -> dict[str, float | int]:
        """The interval as JSON has it."""
        return asdict(self)


def bootstrap_mean(values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean with a percentile bootstrap interval.

    Args:
        values: [N] one finite number per prompt.
        confidence: Share of the resampled means that lies within the bounds, in (0, 1).
        resamples: R, how often N prompts are drawn with replacement.
        seed: Seed of the draws.

    Raises:
        ValueError: No value, a value that is not finite, or settings out of range.

    Example:
        >>> bootstrap_mean([2.0, 2.0, 2.0])
        Interval(mean=2.0, low=2.0, high=2.0, n=3)
    """
    numbers = _finite(values)
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(f"confidence {confidence} must be in (0, 1) and resamples {resamples} positive")
    # Taken from the first value, so that a constant has no width whatever the rounding of its sum.
    origin = numbers[0]
    mean = float(origin + (numbers - origin).mean())
    means = origin + _resampled_means(numbers - origin, resamples, seed)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high), len(numbers))


def paired_difference(
    values: ArrayLike, baseline: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `values - baseline` over the same prompts, with its interval.

    Narrower than the two intervals apart whenever easy prompts are easy for both.

    Args:
        values: [N] one number per prompt.
        baseline: [N] the baseline's numbers, prompt by prompt.
        confidence: As for `bootstrap_mean`.
        resamples: As for `bootstrap_mean`.
        seed: As for `bootstrap_mean`.

    Raises:
        ValueError: As for `bootstrap_mean`, or lengths that differ.
    """
    ours, theirs = _pair(values, baseline)
    return bootstrap_mean(ours - theirs, confidence=confidence, resamples=resamples, seed=seed)


def win_rate(
    values: ArrayLike, baseline: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Share of prompts on which `values` is above `baseline`, a tie counting half, with its interval.

    Args:
        values: [N] one score per prompt.
        baseline: [N] the baseline's scores, prompt by prompt.
        confidence: As for `bootstrap_mean`.
        resamples: As for `bootstrap_mean`.
        seed: As for `bootstrap_mean`.

    Raises:
        ValueError: As for `paired_difference`.

    Example:
        >>> win_rate([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]).mean
        0.625
    """
    ours, theirs = _pair(values, baseline)
    wins = (np.sign(ours - theirs) + 1.0) / 2.0
    return bootstrap_mean(wins, confidence=confidence, resamples=resamples, seed=seed)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"expected one number per prompt, got an array of shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(numbers))[0])} is not finite")
    return numbers


def _pair(values: ArrayLike, baseline: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ours, theirs = _finite(values), _finite(baseline)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)} of the baseline")
    return ours, theirs


def _resampled_means(numbers: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """[R] means of N draws with replacement."""
    rng = np.random.default_rng(seed)
    n = len(numbers)
    rows = max(1, CHUNK_DRAWS // n)
    chunks: Sequence[NDArray[np.float64]] = [
        numbers[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(chunks)
