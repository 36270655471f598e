"""Results, data and answers as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from align.report.numbers import MISSING, as_interval, column_decimals, count, fixed, metric_heading, metrics_of, span
from align.report.remarks import remarks
from align.report.rewards import reward_values
from align.report.verdict import MARKS, Results, direction, is_by_definition, legend, percent

ARROW_STYLES = {1: "bold", 0: "", -1: "bold"}


def results_table(results: Results) -> Table:
    """Candidates by metrics: means over their intervals, marked where they surely differ from the baseline.

    Args:
        results: Content of a `results.json`.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{results.get('n', '?')} held-out prompts, {percent(results)} intervals",
        title_justify="left",
        title_style="",
        caption=legend(results) if len(results["candidates"]) > 1 else None,
        caption_justify="left",
        caption_style="dim",
    )
    metrics = metrics_of(results)
    table.add_column("candidate", no_wrap=True)
    for metric in metrics:
        table.add_column(metric_heading(metric), justify="right", overflow="fold")
    for name, own in results["candidates"].items():
        label = Text(name)
        if name == results.get("baseline"):
            label.append("\nbaseline", style="dim")
        table.add_row(label, *(_cell(results, name, metric, own.get(metric)) for metric in metrics))
    return table


def _cell(results: Results, candidate: str, metric: str, value: Any) -> Text:
    interval = as_interval(value)
    if interval is None or is_by_definition(results, candidate, metric):
        return Text(MISSING, style="dim")
    places, sign = column_decimals(results, metric), direction(results, candidate, metric)
    mean = Text(f"{fixed(interval.mean, places)} {MARKS[sign] or ' '}", style=ARROW_STYLES[sign])
    return mean.append(f"\n{span(interval, places)}", style="dim not bold")


def rewards_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per reward model, one row per number of its evaluation.

    Args:
        evaluations: Stage -> content of its `evaluation.json`.
    """
    columns = {stage: dict(reward_values(evaluation)) for stage, evaluation in evaluations.items()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("reward model", no_wrap=True)
    for stage in columns:
        table.add_column(stage, justify="right")
    for heading in dict.fromkeys(heading for own in columns.values() for heading in own):
        table.add_row(Text(heading), *(Text(own.get(heading, MISSING)) for own in columns.values()))
    return table


def data_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """What became of the rows of every data entry.

    Args:
        reports: Name of the data entry -> content of its data report.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("data", no_wrap=True)
    for heading in ("rows", "examples", "truncated"):
        table.add_column(heading, justify="right")
    table.add_column("remarks")
    for name, report in reports.items():
        numbers = (count(report.get(key)) for key in ("rows_read", "examples", "truncated"))
        table.add_row(Text(name), *numbers, Text("\n".join(remarks(report)) or MISSING))
    return table


def samples_table(samples: Iterable[Mapping[str, Any]]) -> Table:
    """Every candidate's answers to the same prompts, side by side.

    Args:
        samples: Lines of a `samples.jsonl`.
    """
    rows = list(samples)
    candidates = list(dict.fromkeys(name for row in rows for name in row["answers"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for heading in ("prompt", *candidates):
        table.add_column(heading, ratio=1, overflow="fold")
    for row in rows:
        table.add_row(Text(row["prompt"]), *(_answer(row["answers"].get(name)) for name in candidates))
    return table


def _answer(answer: Mapping[str, Any] | None) -> Text:
    if answer is None:
        return Text(MISSING, style="dim")
    text = Text(answer["text"])
    for label, score in answer.get("scores", {}).items():
        text.append(f"\n{label} {fixed(float(score), 2)}", style="dim")
    return text
