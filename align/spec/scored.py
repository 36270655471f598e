"""What scores completions: the settings that stages share which ask for scores."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from align.spec.base import CodeRef, Registered, Settings, StageRef

REWARD = "reward"
"""What a reward model's score is called among the parts of a score."""


def function_name(spec: str) -> str:
    """What the score of a `file.py:function` is called."""
    return spec.rpartition(":")[2]


class Scored(Settings):
    """Mixed into the stages whose completions are scored; several scores make a weighted sum."""

    scores: ClassVar[str] = "completions"
    """What is scored, in messages."""

    reward: Annotated[str, StageRef("reward")] | None = None
    """The stage whose reward model scores them."""
    scorers: list[Annotated[str, Registered("align.scorers")]] = Field(default_factory=list)
    """Names of registered scorers (entry point group `align.scorers`) that score them."""
    functions: list[Annotated[str, CodeRef()]] = Field(default_factory=list)
    """Functions of your own, `file.py:function` each, relative to the recipe. `align run --allow-code` runs them."""
    weights: dict[str, float] = Field(default_factory=dict)
    """What each score counts in the sum: `reward`, the name of a scorer or of a function -> factor. 1 where nothing is
    said; one of 0 only watches."""

    @property
    def parts(self) -> list[str]:
        """What the scores are called that the sum is made of."""
        return [*([REWARD] if self.reward else []), *self.scorers, *map(function_name, self.functions)]

    @model_validator(mode="after")
    def _scored(self) -> Scored:
        if not self.parts:
            raise ValueError(f"nothing scores the {self.scores}: name a `reward` stage, `scorers` or `functions`")
        if twice := sorted({each for each in self.parts if self.parts.count(each) > 1}):
            raise ValueError(f"two scores are called {', '.join(twice)}: rename a function, or name it once")
        return self
