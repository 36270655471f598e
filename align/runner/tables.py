"""Tables of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from align.methods import all_methods
from align.runner.progress import clock
from align.runner.status import StageView


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def status_table(stages: Sequence[StageView]) -> Table:
    """One row per stage of a run."""
    table = _table("stage", "state", "step", "time", "", right=("step", "time"))
    for stage in stages:
        step = f"{stage.step}/{stage.total_steps}" if stage.total_steps else ""
        time = clock(stage.seconds) if stage.seconds else ""
        table.add_row(stage.name, stage.state, step, time, Text(stage.message))
    return table


def tokens_table(counts: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per training stage: what its data becomes under its tokenizer.

    Args:
        counts: What `count_tokens` returns.
    """
    numbers = ("examples", "truncated", "left out", "p50", "p90", "max")
    table = _table("stage", "data", *numbers, right=numbers)
    for stage, count in counts.items():
        if "known_after" in count:
            table.add_row(stage, count["data"], Text(f"known after {count['known_after']}", style="dim"))
            continue
        report = count["report"]
        left_out = sum(report["quarantined"].values()) + sum(report["dropped"].values())
        whole = report["tokens"].get("total") or report["tokens"]["prompt"]  # of prompts alone, those of the prompts
        lengths = (whole[key] for key in ("p50", "p90", "max"))
        table.add_row(
            stage, count["data"], *(f"{n:,}" for n in (report["examples"], report["truncated"], left_out, *lengths))
        )
    table.caption = "p50, p90, max: tokens of prompt and longest completion"
    table.caption_justify = "left"
    return table


def methods_table() -> Table:
    """One row per training method."""
    table = _table("kind", "batch", "reference", "summary", "source")
    for column in table.columns[:3]:
        column.no_wrap = True
    for kind, method in all_methods().items():
        reference = "yes" if method.reference else "no"
        table.add_row(kind, method.batch.value, reference, Text(method.summary), Text(method.source))
    return table
