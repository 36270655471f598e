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
        weights: By the same names. One below 0 makes a score a cost, one of 0 leaves it a column in results.

    Raises:
        RecipeError: There is no scorer, one has no weight, or a weight is no finite number.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        if not scorers or scorers.keys() != weights.keys() or not all(map(math.isfinite, weights.values())):
            raise RecipeError(
                f"{list(scorers)} cannot be weighed with {dict(weights)}",
                where="scorers",
                fix="give each of one or more scorers a weight that is a finite number",
            )
        label = labels(scorers)
        self._parts = [(label[name], scorer, weights[name]) for name, scorer in scorers.items()]
        self.labels = [label[name] for name in scorers]
        self.reads = tuple(
            dict.fromkeys(column for name, scorer in scorers.items() for column in columns_read(name, scorer))
        )

    def score(self, prompt: str, completion: str, fields: Mapping[str, Any], row: int) -> Blended:
        """The scores of one completion; see `score_completion`, which is asked for every part.

        Raises:
            DataError: A scorer cannot use the row.
            TrainingError: What one returned is no score, or the sum is none.
        """
        parts = {
            label: score_completion(label, scorer, prompt, completion, fields, row) for label, scorer, _ in self._parts
        }
        total = sum(weight * parts[label] for label, _, weight in self._parts)
        if not math.isfinite(total):
            raise TrainingError(
                f"the weighted sum of the scores {parts} of the prompt in row {row} is {total}",
                where="scorers",
                fix="mend the scorer whose scores are that large, or lower its weight",
            )
        return Blended(total, parts)
