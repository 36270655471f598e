"""Settings of `kind: score`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.spec.base import CodeRef, DataRef, Registered, StageRef, Unread, cosmetic
from align.spec.data import Format
from align.spec.records import RecordsStage
from align.spec.train import LaunchSettings

REWARD = "reward"
"""What a reward model's score is called among the parts of a score."""


def function_name(spec: str) -> str:
    """What the score of a `file.py:function` is called."""
    return spec.rpartition(":")[2]


class ScoreStage(RecordsStage):
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
    samples: Annotated[str, DataRef(("samples", "ranked"), without=("mt_bench",))]
    """The candidates: a `sample` stage, or data, of one turn each. Scores that they have already are not read."""
    reward: Annotated[str, StageRef("reward")] | None = None
    """The stage whose reward model scores them."""
    scorers: list[Annotated[str, Registered("align.scorers")]] = Field(default_factory=list)
    """Names of registered scorers (entry point group `align.scorers`) that score them."""
    functions: list[Annotated[str, CodeRef()]] = Field(default_factory=list)
    """Functions of your own, `file.py:function` each, relative to the recipe. `align run --allow-code` runs them."""
    weights: dict[str, float] = Field(default_factory=dict)
    """What each score counts in the sum: `reward`, the name of a scorer or of a function -> factor. 1 where nothing is
    said."""
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

    @property
    def parts(self) -> list[str]:
        """What the scores are called that the sum is made of."""
        return [*([REWARD] if self.reward else []), *self.scorers, *map(function_name, self.functions)]

    @model_validator(mode="after")
    def _possible(self) -> ScoreStage:
        if not self.parts:
            raise ValueError("nothing scores the candidates: name a `reward` stage, `scorers` or `functions`")
        if twice := sorted({each for each in self.parts if self.parts.count(each) > 1}):
            raise ValueError(f"two scores are called {', '.join(twice)}: rename a function, or name it once")
        return self
