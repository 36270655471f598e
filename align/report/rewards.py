"""What a reward model's evaluation says, as numbers for a page and a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from align.report.charts import Figure
from align.report.numbers import as_interval, fixed, short, span
from align.report.plots import reliability_plot

Json = Mapping[str, Any]


def reward_values(evaluation: Json, normalization: Json | None = None) -> list[tuple[str, str]]:
    """Heading and value of every number; what a file does not hold is left out.

    Args:
        evaluation: Content of an `evaluation.json`; may be empty.
        normalization: Content of a `normalization.json`.
    """
    if not evaluation:
        return []
    length, rewards, scale = evaluation.get("length") or {}, evaluation.get("rewards") or {}, normalization or {}
    told = {
        "Judged on": f"{evaluation.get('pairs', '?')} {evaluation.get('on', '')} pairs",
        "Pair accuracy": _interval(evaluation.get("accuracy")),
        "Reward margin": _interval(evaluation.get("margin")),
        "Calibration error": _number((evaluation.get("calibration") or {}).get("error")),
        "Reward ~ length (Pearson)": _number(length.get("pearson")),
        "Reward ~ length (Spearman)": _number(length.get("spearman")),
        "Rewards": _scale(rewards),
    }
    if scale.get("n"):
        told["Rewards become 0 ± 1 on"] = f"{scale['n']:,} completions ({scale.get('on', '')}): {_scale(scale)}"
    return [(heading, value) for heading, value in told.items() if value]


def reward_figures(evaluation: Json) -> list[Figure]:
    """The reliability diagram, where there are pairs."""
    bins = (evaluation.get("calibration") or {}).get("bins") or []
    points = [(b["expected"], b["right"], b["n"]) for b in bins if b.get("n")]
    if not points:
        return []
    title = "Right against sure"
    note = f"each point: pairs of which the model is about as sure; from {evaluation.get('on', '')} pairs"
    return [Figure(title, reliability_plot(points, title=f"{title}, in {len(points)} bins"), note=note)]


def _interval(value: Any) -> str:
    found = as_interval(value)
    return f"{fixed(found.mean, 3)}  ({span(found, 3)})" if found else ""


def _number(value: Any) -> str:
    return fixed(value, 3) if isinstance(value, int | float) and math.isfinite(value) else ""


def _scale(content: Json) -> str:
    mean, std = content.get("mean"), content.get("std")
    if not isinstance(mean, int | float) or not isinstance(std, int | float):
        return ""
    return f"{short(mean)} ± {short(std)}"
