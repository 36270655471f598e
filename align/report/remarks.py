"""What a data report has to say, in lines of words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from align.report.numbers import count


def remarks(report: Mapping[str, Any]) -> list[str]:
    """One line per reason why rows were left out, read otherwise than written, or speak against each other."""
    lines = [
        f"{count(n)} {what}: {reason}"
        for what in ("quarantined", "dropped", "noted")
        for reason, n in _mapping(report.get(what)).items()
    ]
    if report.get("contradictions"):
        lines.append(f"{count(report['contradictions'])} pairs are the reverse of another")
    return lines


def lengths(report: Mapping[str, Any]) -> list[str]:
    """One line per part of the examples: its median, 90th percentile and longest, in tokens."""
    lines = []
    for part, quantiles in _mapping(report.get("tokens")).items():
        values = [_mapping(quantiles).get(key) for key in ("p50", "p90", "max")]
        if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            lines.append(f"{part} {' / '.join(map(count, values))}")
    return lines


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
