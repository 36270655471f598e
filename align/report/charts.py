"""Which plots a stage or a comparison gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.evaluation.statistics import Interval
from align.report.numbers import as_interval, column_decimals, heading, metric_heading, short
from align.report.plots import Point, Series, interval_plot, line_plot, scatter_plot
from align.report.verdict import Results, deciding_metric

HELDOUT = "eval_"
FIRST = ("loss",)
LAST = ("learning_rate", "grad_norm", "tokens_per_second")
NOT_DRAWN = ("step", "epoch", "rollout/number", "rollout/gamed", "rollout/seconds")
TOGETHER = ("score",)
"""What is drawn into one plot: how a score and those that only watch go together, or part."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Figure:
    """A plot with its heading, its legend (name, colour number, dashed) and a note."""

    title: str
    svg: str
    legend: tuple[tuple[str, int, bool], ...] = ()
    note: str = ""


def training_figures(metrics: Sequence[dict[str, Any]]) -> list[Figure]:
    """Every logged number over the steps: held-out values with those of training, chosen with rejected.

    Args:
        metrics: Lines of a `metrics.jsonl`.
    """
    columns = _columns(metrics)
    groups: dict[str, list[str]] = {}
    for name in _names(columns):
        if _measured_once(name, columns) or (name != "loss" and _same(columns.get(name), columns.get("loss"))):
            continue
        stem, _, side = name.rpartition("/")
        groups.setdefault(stem if side in SIDES or stem in TOGETHER else name, []).append(name)
    ordered = [g for g in FIRST if g in groups]
    ordered += [g for g in groups if g not in FIRST + LAST]
    ordered += [g for g in LAST if g in groups]
    figures = (_figure(group, groups[group], columns) for group in ordered)
    return [figure for figure in figures if figure is not None]


def single_values(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Heading and value of what was logged once only, and so is no curve."""
    columns = _columns(metrics)
    once = [name for name in _names(columns) if _measured_once(name, columns)]
    return [
        (heading(key), short(columns[key][0][1])) for name in once for key in (name, HELDOUT + name) if key in columns
    ]


def comparison_figures(results: Results) -> list[Figure]:
    """The deciding score by candidate and against the KL, and every further score by candidate."""
    decider, baseline = deciding_metric(results), results.get("baseline")
    if decider is None:
        return []
    metrics = results["candidates"][baseline]
    scores = [decider, *(m for m in metrics if m not in (decider, "win_rate", "kl", "length", "ended"))]
    figures = []
    for metric in scores:
        rows = list(_intervals(results, metric).items())
        if rows:
            decimals, title = column_decimals(results, metric), heading(metric)
            plot = interval_plot(rows, title=f"{title} by candidate", decimals=decimals, baseline=baseline)
            figures.append(Figure(title, plot))
    kl, reward = _intervals(results, "kl"), _intervals(results, decider)
    points = [Point(name, kl[name], reward[name]) for name in reward if name in kl]
    if points:
        title = f"{heading(decider)} against the KL to {baseline}"
        svg = scatter_plot(
            points, title=title, x_label=metric_heading("kl") + " per answer", y_label=decider, baseline=baseline
        )
        figures.insert(1, Figure(title, svg))
    return figures


def _intervals(results: Results, metric: str) -> dict[str, Interval]:
    """Candidate -> its interval of a metric, where there is one."""
    found = {name: as_interval(own.get(metric)) for name, own in results["candidates"].items()}
    return {name: interval for name, interval in found.items() if interval is not None}


Column = list[tuple[float, float]]


def _columns(metrics: Sequence[dict[str, Any]]) -> dict[str, Column]:
    """Metric -> (step, value) in order of the steps."""
    columns: dict[str, Column] = {}
    for line in metrics:
        step = line.get("step")
        if not isinstance(step, int | float):
            continue
        for key, value in line.items():
            if key not in NOT_DRAWN and isinstance(value, int | float) and not isinstance(value, bool):
                columns.setdefault(key, []).append((float(step), float(value)))
    return {key: sorted(column, key=lambda point: point[0]) for key, column in columns.items()}


def _names(columns: dict[str, Column]) -> list[str]:
    """Metrics in the order they were first logged, a held-out one under the name of its training metric."""
    return list(dict.fromkeys(key.removeprefix(HELDOUT) for key in columns))


def _measured_once(name: str, columns: dict[str, Column]) -> bool:
    return all(len(columns.get(key, ())) <= 1 for key in (name, HELDOUT + name))


def _same(one: Column | None, other: Column | None) -> bool:
    """Whether a metric is the loss under another name: no eye would tell the curves apart."""
    if not one or not other or len(one) != len(other):
        return False
    return all(a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=5e-3) for a, b in zip(one, other, strict=True))


def _figure(group: str, names: Sequence[str], columns: dict[str, Column]) -> Figure | None:
    series = []
    for i, name in enumerate(names):
        side = name.rpartition("/")[2] if len(names) > 1 else ""
        for key, dashed, where in ((name, False, "training"), (HELDOUT + name, True, "held-out")):
            if key in columns:
                colour = i if len(names) > 1 else int(dashed)
                label = where if not side else f"{side}, {where}" if dashed else side
                series.append(Series(label, tuple(columns[key]), colour, dashed))
    drawn = [s for s in series if s.finite]
    broken = sum(len(s.points) - len(s.finite) for s in series)
    note = f"{broken} value{'s' * (broken > 1)} not finite, not drawn" if broken else ""
    if not drawn:
        return Figure(heading(group), "", note=note) if note else None
    legend = tuple((s.name, s.colour, s.dashed) for s in drawn) if len(drawn) > 1 else ()
    return Figure(heading(group), line_plot(drawn, title=f"{heading(group)} by step"), legend, note)
