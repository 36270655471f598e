"""From what was measured on every answer to the results of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.evaluation.statistics import Interval, bootstrap_mean, paired_difference, win_rate

Statistic = Callable[..., Interval]


@dataclass(frozen=True)
class Measured:
    """What was measured on one candidate, one number per held-out prompt in the order of the prompts.

    Attributes:
        scores: Label of the scorer -> scores of the answers; the first decides win rates.
        kl: log p_candidate - log p_baseline of a completion that the candidate drew at temperature 1, in nats per
            sequence: its mean estimates KL(candidate || baseline) without bias; single values may be negative.
        length: Tokens of the answers, EOS included.
        ended: Whether the answers ended with EOS before the limit.
    """

    scores: Mapping[str, Sequence[float]]
    kl: Sequence[float]
    length: Sequence[int]
    ended: Sequence[bool]

    def columns(self) -> dict[str, list[float]]:
        """Metric -> [N] numbers, in the order that tables show."""
        own = {"kl": self.kl, "length": self.length, "ended": self.ended}
        return {name: [float(v) for v in values] for name, values in {**self.scores, **own}.items()}


def compare_candidates(
    measured: Mapping[str, Measured], *, baseline: str, confidence: float, resamples: int
) -> dict[str, Any]:
    """Means with intervals of every candidate, and paired differences to the baseline.

    Args:
        measured: Candidate -> its measurements, the baseline among them.
        baseline: Whose scores win rates and differences are taken against.
        confidence: Share of the bootstrap distribution within the bounds.
        resamples: Bootstrap resamples over prompts.

    Returns:
        ``{"candidates": {name: {metric: interval}}, "differences": {name: {metric: interval}}, "baseline",
        "confidence", "n"}``; ``differences`` leaves out the baseline itself and the KL, which is a difference already.
    """
    sure: dict[str, Any] = {"confidence": confidence, "resamples": resamples}
    mean, versus, wins = (partial(f, **sure) for f in (bootstrap_mean, paired_difference, win_rate))
    reference = measured[baseline].columns()
    deciding = next(iter(measured[baseline].scores), None)
    candidates: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for name, own in measured.items():
        columns = own.columns()
        intervals = {metric: mean(values) for metric, values in columns.items()}
        if deciding is not None:
            rate = wins(columns[deciding], reference[deciding])
            intervals = {deciding: intervals.pop(deciding), "win_rate": rate, **intervals}
        candidates[name] = {metric: interval.to_dict() for metric, interval in intervals.items()}
        if name != baseline:
            differences[name] = {
                metric: versus(values, reference[metric]).to_dict()
                for metric, values in columns.items()
                if metric != "kl"
            }
    return {
        "candidates": candidates,
        "differences": differences,
        "baseline": baseline,
        "confidence": confidence,
        "n": len(measured[baseline].length),
    }
