"""What a reward model is worth: how often it orders pairs right, how sure it is of it, and what its rewards go with.

Shape letters: P pairs, C completions.
*Source*: calibration as in arXiv:1706.04599, eq. 3. The probability that a reward model gives to its own choice in a
pair, sigmoid(|r_i - r_j|), is at least 1/2, so the bins divide [1/2, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evaluation.statistics import bootstrap_mean

BINS = 10

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """The candidates of one prompt under a reward model.

    Attributes:
        rewards: What the model gave each.
        scores: How good each is in the data; equal ones make no pair.
        lengths: Tokens of each, EOS included.
    """

    rewards: Sequence[float]
    scores: Sequence[float]
    lengths: Sequence[int]

    def margins(self) -> Iterator[float]:
        """Reward of the better minus reward of the worse, pair by pair."""
        for better, high in zip(self.rewards, self.scores, strict=True):
            for worse, low in zip(self.rewards, self.scores, strict=True):
                if high > low:
                    yield better - worse


def evaluate_rewards(judged: Sequence[Judged], *, confidence: float = 0.95, resamples: int = 2000) -> dict[str, Any]:
    """Accuracy with its interval, calibration, correlation with length, and the scale of the rewards.

    Args:
        judged: One entry per prompt.
        confidence: Of the intervals, by bootstrap over prompts.
        resamples: Of the bootstrap.

    Returns:
        ``accuracy`` and ``margin``: means over a prompt's pairs, then over prompts, as intervals (None without a
        pair); a tie counts half. ``calibration``: ``error``, the mean distance between how sure the model is and how
        often it is right, and the ``bins``. ``length``: Pearson's and Spearman's correlation of reward and length over
        all completions, None where one of the two is constant. ``rewards``: mean and standard deviation.
    """
    margins = [np.fromiter(each.margins(), np.float64) for each in judged]
    paired = [own for own in margins if len(own)]
    right = [(np.sign(own) + 1.0) / 2.0 for own in paired]
    sure: dict[str, Any] = {"confidence": confidence, "resamples": resamples}
    rewards = np.array([r for each in judged for r in each.rewards], dtype=np.float64)
    lengths = np.array([n for each in judged for n in each.lengths], dtype=np.float64)

    def interval(columns: list[Numbers]) -> dict[str, float | int] | None:
        return bootstrap_mean([own.mean() for own in columns], **sure).to_dict() if columns else None

    return {
        "prompts": len(judged),
        "pairs": sum(map(len, paired)),
        "completions": len(rewards),
        "confidence": confidence,
        "accuracy": interval(right),
        "margin": interval(paired),
        "calibration": calibration(np.concatenate(paired)) if paired else None,
        "length": {
            "pearson": correlation(rewards, lengths),
            "spearman": correlation(ranks(rewards), ranks(lengths)),
        },
        "rewards": {"mean": float(rewards.mean()), "std": float(rewards.std())},
    }


def calibration(margins: ArrayLike, bins: int = BINS) -> dict[str, Any]:
    """How sure a reward model is of its choice in a pair, against how often it is right.

    Args:
        margins: [P] reward of the better minus reward of the worse; at least one.
        bins: Into how many equal parts [1/2, 1] is cut.

    Returns:
        ``error``, the expected calibration error, and ``bins``: for each its bounds, its pairs, and the means
        ``expected`` and ``right`` (None where it has no pair).

    Example:
        >>> round(calibration([0.0, 0.0])["error"], 6)
        0.0
    """
    found = np.asarray(margins, dtype=np.float64)
    expected = 1.0 / (1.0 + np.exp(-np.abs(found)))
    right = (np.sign(found) + 1.0) / 2.0
    at = np.clip(((expected - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    told: list[dict[str, float | int | None]] = []
    error = 0.0
    for b in range(bins):
        own = at == b
        n = int(own.sum())
        bounds = {"low": 0.5 + b / (2 * bins), "high": 0.5 + (b + 1) / (2 * bins)}
        if not n:
            told.append({**bounds, "n": 0, "expected": None, "right": None})
            continue
        sure, share = float(expected[own].mean()), float(right[own].mean())
        told.append({**bounds, "n": n, "expected": sure, "right": share})
        error += n / len(found) * abs(sure - share)
    return {"error": error, "bins": told}


def correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's correlation of two columns; None where one of them is constant."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    # Sums of equal numbers round: what is left of a constant is no variation.
    return float(a @ b) / scale if scale > 1e-12 * len(a) else None


def ranks(values: ArrayLike) -> Numbers:
    """Ranks from 1 on, equal values sharing their mean rank: Pearson's correlation of these is Spearman's.

    Example:
        >>> ranks([3.0, 1.0, 3.0]).tolist()
        [2.5, 1.0, 2.5]
    """
    _, where, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2.0)[where]


def headline(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of an evaluation, by the names they have among an artifact's metrics."""
    calibrated, length, rewards = evaluation["calibration"], evaluation["length"], evaluation["rewards"]
    found = {
        "accuracy": evaluation["accuracy"] and evaluation["accuracy"]["mean"],
        "margin": evaluation["margin"] and evaluation["margin"]["mean"],
        "calibration_error": calibrated and calibrated["error"],
        "length_pearson": length["pearson"],
        "length_spearman": length["spearman"],
        "reward_mean": rewards["mean"],
        "reward_std": rewards["std"],
    }
    return {f"evaluation/{name}": value for name, value in found.items() if value is not None}
