"""Tells in words when a score rises while everything else says that it is being gamed (arXiv:2210.10760)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

ENOUGH = 8
"""Rollouts before anything can be told."""
SPAN = 4
"""Rollouts at either end that are compared."""
LENGTH_FACTOR = 1.5
KL_NATS = 25.0
"""KL per completion that no healthy policy of this size of task needs."""


def told_gaming(history: Sequence[dict[str, float]], scored: Sequence[str], watched: Sequence[str]) -> list[str]:
    """What is suspicious about the rollouts so far.

    Args:
        history: A few numbers of every rollout.
        scored: Columns that the policy is rewarded for.
        watched: All columns; one that is not rewarded only watches.
    """
    if len(history) < ENOUGH:
        return []

    def ends(name: str) -> tuple[float, float] | None:
        values = [each[name] for each in history if name in each]
        return (fmean(values[:SPAN]), fmean(values[-SPAN:])) if len(values) >= ENOUGH else None

    rising = [(c, e) for c in scored if (e := ends(f"score/{c}")) is not None and e[1] > e[0]]
    if not rising:
        return []
    column, (low, high) = rising[0]
    rose = f"the score `{column}` rose from {low:.3g} to {high:.3g}"
    found = []
    for other in watched:
        if other not in scored and (e := ends(f"score/{other}")) is not None and e[1] < e[0]:
            found.append(f"{rose} while `{other}`, which only watches, fell from {e[0]:.3g} to {e[1]:.3g}")
    if (e := ends("rollout/length")) is not None and max(e) > LENGTH_FACTOR * min(e):
        found.append(f"{rose} while completions went from {e[0]:.0f} to {e[1]:.0f} tokens")
    if (e := ends("rollout/kl")) is not None and e[1] > KL_NATS:
        found.append(f"{rose} at a KL of {e[1]:.0f} nats per completion to the reference")
    if (e := ends("rollout/ended")) is not None and e[1] < 0.5 * e[0]:
        found.append(f"{rose} while the share of completions that end fell from {e[0]:.0%} to {e[1]:.0%}")
    advice = "; the score may be gamed: look at samples.jsonl, raise beta, or stop earlier"
    return [each + advice for each in found]
