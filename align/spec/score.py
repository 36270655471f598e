"""Settings of `kind: score`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from align.spec.base import DataRef, Unread, cosmetic
from align.spec.data import Format
from align.spec.records import RecordsStage
from align.spec.scored import Scored
from align.spec.train import LaunchSettings


class ScoreStage(RecordsStage, Scored):
    """Scores candidates: a ranked list for every prompt."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "missing_eos_score",
            lambda stage: stage.missing_eos != "replace",
            "only `missing_eos: replace` reads it",
            "remove it, or write `missing_eos: replace`",
        ),
    )

    kind: Literal["score"] = "score"
    scores: ClassVar[str] = "candidates"
    samples: Annotated[str, DataRef(("samples", "ranked"), without=("mt_bench",))]
    """The candidates: a `sample` stage, or data, of one turn each. Scores that they have already are not read."""
    missing_eos: Literal["drop", "keep", "replace"] = "drop"
    """What becomes of a candidate that was cut off before its end: it gets no score and so is left out, it is scored as
    if it had ended there, or its score is `missing_eos_score`. Training would teach to stop in the middle."""
    missing_eos_score: float = -1.0
    """In units of the sum of scores."""
    launch: LaunchSettings | None = cosmetic(None)
    """Overrides the recipe's `launch`; processes share the candidates."""

    @property
    def makes(self) -> Format:
        return "ranked"
