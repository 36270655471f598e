"""Tells in words when a score rises while everything else says that it is being gamed (arXiv:2210.10760)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

ENOUGH = 8
"""Rollouts before anything can be told."""
SPAN = 4
"""Rollouts that a mean is taken over, for one alone is noise."""
LOST = 1 / 3
"""Share of what was gained that has to be lost again."""
LENGTH_FACTOR = 1.5
KL_NATS = 25.0
"""KL per completion that no healthy policy of this size of task needs."""
ADVICE = "; the score may be gamed: look at samples.jsonl, raise beta, or stop earlier"


def told_gaming(history: Sequence[dict[str, float]], scored: Sequence[str], watched: Sequence[str]) -> list[str]:
    """What is suspicious about the rollouts so far.

    Args:
        history: A few numbers of every rollout.
        scored: Columns that the policy is rewarded for.
        watched: All columns; one that is not rewarded only watches.
    """
    if len(history) < ENOUGH:
        return []
    rising = next((c for c in scored if (means := _means(history, f"score/{c}")) and means[-1] > means[0]), None)
    if rising is None:
        return []
    score = _means(history, f"score/{rising}")
    rose = f"the score `{rising}` rose from {score[0]:.3g} to {score[-1]:.3g}"
    found = []
    for other in watched:
        means = _means(history, f"score/{other}") if other not in scored else []
        peak = max(range(len(means)), key=means.__getitem__, default=0)
        if means and means[-1] < means[peak] - LOST * max(means[peak] - means[0], 0.0) and score[-1] >= score[peak]:
            found.append(f"{rose} while `{other}`, which only watches, fell from {means[peak]:.3g} to {means[-1]:.3g}")
    if (lengths := _means(history, "rollout/length")) and not 1 / LENGTH_FACTOR < lengths[-1] / lengths[
        0
    ] < LENGTH_FACTOR:
        found.append(f"{rose} while completions went from {lengths[0]:.0f} to {lengths[-1]:.0f} tokens")
    if (kl := _means(history, "rollout/kl")) and kl[-1] > KL_NATS:
        found.append(f"{rose} at a KL of {kl[-1]:.0f} nats per completion to the reference")
    if (ended := _means(history, "rollout/ended")) and ended[-1] < 0.5 * ended[0]:
        found.append(f"{rose} while the share of completions that end fell from {ended[0]:.0%} to {ended[-1]:.0%}")
    return [each + ADVICE for each in found]


def _means(history: Sequence[dict[str, float]], name: str) -> list[float]:
    """Running means over some rollouts; nothing where too few have the number."""
    values = [each[name] for each in history if name in each]
    return [fmean(values[i : i + SPAN]) for i in range(len(values) - SPAN + 1)] if len(values) >= ENOUGH else []
