"""A plan as a table for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from align.recipe.plan import Plan, PlanRow, size_text
from align.recipe.reference import ReferenceNode


def plan_table(plan: Plan) -> Table:
    """One row per stage, and what all of them take."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("stage", "all")
    table.add_column("kind")
    table.add_column("state")
    table.add_column("steps", justify="right")
    table.add_column(
        "memory/rank", size_text(max((row.total_memory or 0 for row in plan.rows), default=0)), justify="right"
    )
    table.add_column("disk", size_text(plan.disk_needed), justify="right")
    table.add_column("", overflow="fold")
    waiting = list(plan.references)
    for row in plan.rows:
        for node in [each for each in waiting if row.stage in each.users]:
            table.add_row(node.name, "reference", node.state, _reference_rows(node), "", "", node.note)
            waiting.remove(node)
        state = f"resume at {row.resume_step}" if row.state == "resume" else row.state
        notes = ([f"packing {row.packing}"] if row.packing else []) + list(row.notes)
        table.add_row(
            row.stage, row.kind, state, _steps(row), size_text(row.total_memory), size_text(row.disk), "\n".join(notes)
        )
    for note in plan.notes:
        table.add_row("", "", "", "", "", "", note)
    return table


def _reference_rows(node: ReferenceNode) -> str:
    if node.known_after is not None:
        return f"known after {node.known_after}"
    if node.rows is None:
        return "known after data is read"
    return f"{'≤ ' if node.at_most else ''}{node.rows} rows"


def _steps(row: PlanRow) -> str:
    if not row.trains:
        return ""
    if row.steps is None:
        return f"known after {row.known_after or 'data is read'}"
    return f"≤ {row.steps}" if row.at_most else str(row.steps)
