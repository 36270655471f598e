"""Tables of the command line."""

from __future__ import annotations

from collections.abc import Sequence

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


def methods_table() -> Table:
    """One row per training method."""
    table = _table("kind", "batch", "reference", "summary", "source")
    for kind, method in all_methods().items():
        reference = "yes" if method.reference else "no"
        table.add_row(kind, method.batch.value, reference, Text(method.summary), Text(method.source))
    return table
