"""What a comparison allows to be said: which differences to the baseline are more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from align.report.numbers import as_interval, decimals_of, fixed, span

Results = Mapping[str, Any]
MARKS = {1: "↑", 0: "", -1: "↓"}


def direction(results: Results, candidate: str, metric: str) -> Literal[-1, 0, 1]:
    """Whether a candidate is surely above (1) or below (-1) the baseline in a metric, or neither (0).

    Judged by the interval of the paired difference; where a file has none, by intervals that do not overlap. The KL is
    not judged: it is a distance, and above 0 for every other policy.
    """
    baseline = results.get("baseline")
    if candidate == baseline or metric == "kl":
        return 0
    own = as_interval(results["candidates"][candidate].get(metric))
    if metric == "win_rate":
        return 0 if own is None or not own.excludes(0.5) else _sign(own.mean - 0.5)
    paired = as_interval(results.get("differences", {}).get(candidate, {}).get(metric))
    if paired is not None:
        return _sign(paired.mean) if paired.excludes(0.0) else 0
    other = as_interval(results["candidates"].get(baseline, {}).get(metric))
    if own is None or other is None or (own.low <= other.high and other.low <= own.high):
        return 0
    return _sign(own.mean - other.mean)


def deciding_metric(results: Results) -> str | None:
    """The label of the first scorer: the metric just before the win rate. None where nothing was scored."""
    metrics = list(results["candidates"].get(results.get("baseline"), {}))
    return metrics[metrics.index("win_rate") - 1] if "win_rate" in metrics else None


def is_by_definition(results: Results, candidate: str, metric: str) -> bool:
    """Whether a number says nothing: the baseline against itself."""
    return candidate == results.get("baseline") and metric in ("win_rate", "kl")


def legend(results: Results) -> str:
    """What the marks of `direction` mean."""
    return (
        f"↑ ↓ differs from {results.get('baseline')}: the {percent(results)} interval of the paired difference "
        "leaves out zero"
    )


def percent(results: Results) -> str:
    """The confidence as text: `95 %`."""
    return f"{100 * float(results.get('confidence', 0.95)):g} %"


def finding(results: Results) -> str | None:
    """The best candidate by the deciding scorer, its lead over the baseline, and what came with it."""
    metric, baseline = deciding_metric(results), str(results.get("baseline"))
    means = {name: as_interval(own.get(metric)) for name, own in results["candidates"].items()} if metric else {}
    scored = {name: interval for name, interval in means.items() if interval is not None}
    if not metric or not scored:
        return None
    best = max(scored, key=lambda name: (scored[name].mean, name == baseline))
    value = fixed(scored[best].mean, decimals_of(scored[best]))
    if best == baseline:
        return f"No candidate scores above the baseline {baseline} on {metric}, {value}."
    lead = _lead(results, best, metric)
    if direction(results, best, metric) == 1:
        return f"{best} scores highest on {metric}, {value}, above {baseline}{lead}{_price(results, best)}."
    return f"{best} scores highest on {metric}, {value}, but its lead over {baseline}{lead} is within chance."


def _lead(results: Results, candidate: str, metric: str) -> str:
    paired = as_interval(results.get("differences", {}).get(candidate, {}).get(metric))
    if paired is None:
        return ""
    return f" by {fixed(paired.mean, decimals_of(paired))} ({percent(results)} interval {span(paired)})"


def _price(results: Results, candidate: str) -> str:
    """How far the policy moved for it, and whether its answers changed in length: scores may reward that alone."""
    told = []
    kl = as_interval(results["candidates"][candidate].get("kl"))
    if kl is not None:
        told.append(f"a KL of {fixed(kl.mean, min(1, decimals_of(kl)))} nats")
    if sign := direction(results, candidate, "length"):
        longer = as_interval(results.get("differences", {}).get(candidate, {}).get("length"))
        amount = f"{fixed(abs(longer.mean), min(1, decimals_of(longer)))} tokens " if longer else ""
        told.append(f"answers {amount}{'longer' if sign > 0 else 'shorter'}")
    return f", at {' and '.join(told)}" if told else ""


def _sign(value: float) -> Literal[-1, 0, 1]:
    return 1 if value > 0 else -1 if value < 0 else 0
