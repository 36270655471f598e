"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.evaluation.statistics import Interval

MISSING = "–"
UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""(least number it is used for, scale, unit)."""


def as_interval(value: Any) -> Interval | None:
    """The interval a file holds; None where it is absent or not one."""
    try:
        mean, low, high = (float(value[key]) for key in ("mean", "low", "high"))
        n = int(value["n"])
    except (KeyError, TypeError, ValueError):
        return None
    return Interval(mean, low, high, n) if all(map(math.isfinite, (mean, low, high))) else None


def decimals_of(interval: Interval) -> int:
    """Decimals that show two digits of half the interval's width; three of the mean where it has none."""
    half = (interval.high - interval.low) / 2
    size, digits = (half, 2) if half > 0 else (abs(interval.mean), 3)
    return 3 if size == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(size))))


def span(interval: Interval, decimals: int | None = None) -> str:
    """The bounds: `0.690–0.733`, and where one is negative `−0.1 to 0.2`."""
    places = decimals_of(interval) if decimals is None else decimals
    dash = " to " if interval.low < 0 else "–"
    return f"{fixed(interval.low, places)}{dash}{fixed(interval.high, places)}"


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals and a true minus sign, never a negative zero."""
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")


def short(value: float) -> str:
    """A number in about four characters: 0.693, 2e−4, 12.5k."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return _scientific(value)
    for least, scale, unit in UNITS:
        if size >= least:
            return f"{_trimmed(value / scale, 1)}{unit}"
    return _trimmed(value, max(0, 2 - math.floor(math.log10(size))))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers whose first and last enclose [low, high]."""
    if low == high:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw / 1.4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of ticks, all in one unit and with the decimals that their step needs."""
    step, size = values[1] - values[0], max(abs(v) for v in values)
    if size < 1e4 and step < 5e-4:
        return [_scientific(v) if abs(v) > step / 2 else "0" for v in values]
    scale, unit = next(((scale, unit) for least, scale, unit in UNITS if size >= least), (1.0, ""))
    step /= scale
    decimals = next(d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
    return [fixed(v / scale, decimals) + (unit if abs(v) > step / 2 else "") for v in values]


def column_decimals(results: Mapping[str, Any], metric: str) -> int:
    """Decimals that suit every candidate's interval of a metric, so that a column lines up."""
    found = [as_interval(own.get(metric)) for own in results["candidates"].values()]
    wide = [interval for interval in found if interval is not None and interval.high > interval.low]
    known = wide or [interval for interval in found if interval is not None]
    return min(map(decimals_of, known), default=0)


def count(value: Any) -> str:
    """A whole number with thousands apart."""
    return f"{int(value):,}" if isinstance(value, int | float) and math.isfinite(value) else MISSING


def duration(seconds: float) -> str:
    """`4.2 s`, `12 min 5 s`, `3 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def size(amount: float) -> str:
    """Bytes in binary units: `1.4 GiB`."""
    value = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def heading(key: str) -> str:
    """A metric's key as a heading: `learning_rate` -> `Learning rate`, `rewards/margin` -> `Rewards · margin`."""
    text = key.replace("_", " ").replace("/", " · ")
    return text[:1].upper() + text[1:]


def metric_heading(metric: str) -> str:
    """The heading of a column of results; KL and length carry their units."""
    return {"kl": "KL (nats)", "length": "length (tokens)"}.get(metric, metric.replace("_", " "))


def metrics_of(results: Mapping[str, Any]) -> list[str]:
    """The metrics of a comparison, in the order of its first candidate, then what others add."""
    return list(dict.fromkeys(metric for own in results["candidates"].values() for metric in own))


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def _trimmed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
