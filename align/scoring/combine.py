"""Several scorers as one: the weighted sum of what they say, and what each says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import RecipeError, TrainingError
from align.scoring.registry import Scorer, columns_read, labels, score_completion


@dataclass(frozen=True)
class Blended:
    """The scores of one completion.

    Attributes:
        total: The sum of weight times score.
        parts: Label of a scorer -> its score, without its weight.
    """

    total: float
    parts: dict[str, float]


class Blend:
    """Scorers with weights.

    Args:
        scorers: By name.
        weights: By the same names. One below 0 makes a score a cost, one of 0 leaves it a column in results. Further
            names are those of scores that are given to `score`: a reward model scores many completions at once.

    Raises:
        RecipeError: A scorer has no weight, a weight is no finite number, or there is none.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        if not weights or scorers.keys() - weights.keys() or not all(map(math.isfinite, weights.values())):
            raise RecipeError(
                f"{list(scorers)} cannot be weighed with {dict(weights)}",
                where="weights",
                fix="give each of one or more scores a weight that is a finite number",
            )
        self._scorers, self._weights = dict(scorers), dict(weights)
        self._given = weights.keys() - scorers.keys()
        label = {name: each for name, each in labels(scorers).items() if each not in self._given}
        self._labels = {name: label.get(name, name) for name in weights}
        columns = (column for name, scorer in scorers.items() for column in columns_read(name, scorer))
        self.reads = tuple(dict.fromkeys(columns))

    @property
    def labels(self) -> list[str]:
        """What the parts are called in results."""
        return list(self._labels.values())

    def score(
        self,
        prompt: str,
        completion: str,
        fields: Mapping[str, Any],
        row: int,
        given: Mapping[str, float] | None = None,
    ) -> Blended:
        """The scores of one completion; see `score_completion`, which is asked for what is not given.

        Raises:
            DataError: A scorer cannot use the row.
            TrainingError: What one returned is no score, or the sum is none.
        """
        scores = dict(given or {})
        assert scores.keys() == self._given, f"given {sorted(scores)}, weights name {sorted(self._given)}"
        for name, scorer in self._scorers.items():
            scores[name] = score_completion(self._labels[name], scorer, prompt, completion, fields, row)
        parts = {label: scores[name] for name, label in self._labels.items()}
        total = sum(weight * scores[name] for name, weight in self._weights.items())
        if not math.isfinite(total):
            raise TrainingError(
                f"the weighted sum of the scores {parts} of the prompt in row {row} is {total}",
                where="weights",
                fix="mend the scorer whose scores are that large, or lower its weight",
            )
        return Blended(total, parts)
