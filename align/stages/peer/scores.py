"""What completions score, as the functions that TRL calls and adds up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data import PromptExample
from align.errors import TrainingError
from align.scoring import Scorer, score_completion
from align.spec.online import RolloutStage
from align.spec.scored import REWARD
from align.stages.scorers import columns_of
from align.training.online import RewardModel

MISSING_EOS = "missing_eos"
"""What the function is called that counts completions without an end."""

Function = Callable[..., list[float | None]]


class Scores:
    """The scores of the present rollout.

    TRL leaves out of a completion's sum whatever gives None for it: that is how a missing end replaces its scores.

    Args:
        settings: The stage's.
        prompts: What can be asked; TRL is given their numbers.
        scorers: The stage's scorers and functions, by what they are called in `weights`.
        reward: The stage's reward model, if it has one.

    Attributes:
        ended: [C] whether each completion of the rollout has ended by itself; whoever draws it says so.
        found: Column -> [C] what each completion scored, ended or not.
    """

    def __init__(
        self,
        settings: RolloutStage,
        prompts: Sequence[PromptExample],
        scorers: Mapping[str, Scorer],
        reward: RewardModel | None,
    ) -> None:
        self.settings, self.prompts, self.scorers, self.reward = settings, prompts, scorers, reward
        self.columns = ([REWARD] if reward is not None else []) + list(columns_of(scorers).values())
        self.ended: list[bool] = []
        self.found: dict[str, Tensor] = {}

    @property
    def weights(self) -> list[float]:
        """What each function counts in the sum."""
        names = ([REWARD] if self.reward is not None else []) + list(self.scorers)
        own = [self.settings.weights.get(name, 1.0) for name in names]
        return [*own, 1.0] if self._costs else own

    @property
    def functions(self) -> list[Function]:
        """One function per column, and one for what a missing end costs."""
        made = [self._column(REWARD, self._rewards)] if self.reward is not None else []
        for name, column in columns_of(self.scorers).items():
            made.append(self._column(column, self._scored_by(name)))
        return [*made, _called(MISSING_EOS, self._missing)] if self._costs else made

    @property
    def sums(self) -> Tensor:
        """[C] weighted sums of what was found, before anything is made of a missing end."""
        pairs = zip(self.weights, self.columns, strict=False)
        return torch.stack([weight * self.found[column] for weight, column in pairs]).sum(0)

    @property
    def _costs(self) -> bool:
        return self.settings.missing_eos in ("replace", "subtract")

    def _column(self, column: str, score: Callable[[list[int], list[str], list[list[int]]], list[float]]) -> Function:
        def function(
            prompts: list[int], completions: list[str], completion_ids: list[list[int]], **_: Any
        ) -> list[float | None]:
            found = score(prompts, completions, completion_ids)
            self.found[column] = torch.tensor(found, dtype=torch.float32)
            if self.settings.missing_eos != "replace":
                return list(found)
            return [value if ended else None for value, ended in zip(found, self.ended, strict=True)]

        return _called(column, function)

    def _missing(self, **_: Any) -> list[float | None]:
        return [None if ended else self.settings.missing_eos_score for ended in self.ended]

    def _rewards(self, prompts: list[int], _: list[str], completion_ids: list[list[int]]) -> list[float]:
        k = self.settings.completions
        asked = [self.prompts[i] for i in prompts[::k]]
        assert self.reward is not None
        drawn = [completion_ids[i : i + k] for i in range(0, len(completion_ids), k)]
        rewards = self.reward.rewards(asked, drawn)
        bad = [p.row for p, own in zip(asked, rewards, strict=True) if not all(map(math.isfinite, own))]
        if bad:  # TRL would take it for a score that is not there
            raise TrainingError(
                f"the score of `{REWARD}` is not finite under engine: trl. Rows of the data: {bad}",
                fix="lower learning_rate, look at these rows with `align data preview`, or use a wider dtype",
            )
        return [value for own in rewards for value in own]

    def _scored_by(self, name: str) -> Callable[[list[int], list[str], list[list[int]]], list[float]]:
        scorer = self.scorers[name]

        def score(prompts: list[int], completions: list[str], _: list[list[int]]) -> list[float]:
            asked = [self.prompts[i] for i in prompts]
            return [
                score_completion(name, scorer, p.text, text, p.fields, p.row)
                for p, text in zip(asked, completions, strict=True)
            ]

        return score


def _called(name: str, function: Function) -> Function:
    """The function under the name that TRL logs it by."""

    def called(**given: Any) -> list[float | None]:
        return function(**given)

    called.__name__ = name
    return called
