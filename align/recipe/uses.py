"""What stages that train nothing run, and what they make, for a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.recipe.rows import count_rows
from align.spec.sample import SampleStage
from align.spec.score import ScoreStage
from align.spec.select import SelectStage
from align.spec.stages import CompareStage, Stage

if TYPE_CHECKING:
    from align.recipe.graph import Node


def models_used(stage: Stage) -> list[str]:
    """The stages whose models a stage runs without training one."""
    if isinstance(stage, CompareStage):
        return stage.candidates
    if isinstance(stage, SampleStage):
        return stage.policies
    return [stage.reward] if isinstance(stage, ScoreStage) and stage.reward is not None else []


def records_note(node: Node, folder: Path) -> str:
    """What the records of a stage are made of; empty for a stage that makes none.

    Args:
        node: The stage.
        folder: Where relative paths start.
    """
    stage = node.stage
    if isinstance(stage, ScoreStage):
        return f"{stage.samples} scored by {', '.join(stage.parts)}"
    if isinstance(stage, SelectStage):
        return f"{stage.how} of {stage.candidates}"
    if not isinstance(stage, SampleStage):
        return ""
    rows = count_rows(node.data[stage.prompts], folder)
    prompts = "every prompt" if rows is None else f"≤ {rows} prompts"
    return f"{stage.completions} answers of {', '.join(stage.policies)} to {prompts}"
