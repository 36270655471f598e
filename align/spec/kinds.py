"""The kinds of stages that do not train."""

from __future__ import annotations

from align.spec.sample import SampleStage
from align.spec.score import ScoreStage
from align.spec.select import SelectStage
from align.spec.stages import CompareStage, Stage

OTHER_KINDS: dict[str, type[Stage]] = {
    "sample": SampleStage,
    "score": ScoreStage,
    "select": SelectStage,
    "compare": CompareStage,
}
"""Kind -> its settings."""
