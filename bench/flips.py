"""How often a token that is drawn depends on what is drawn beside it.

The numbers that decide belong to the completion. What is left is rounding: matrix products of other sizes may add up in
another order, and a number that falls next to the border between two tokens then chooses the other one. After that the
completion is another one, so tokens are compared up to the first that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from align.models.roles import RoleModel
from align.rollout import keyed_draws, sample
from align.spec.stages import GenerationSettings

MANY, FEW, K = 64, 6, 2
"""Rows side by side in the two runs that are compared, and completions per prompt."""


@dataclass(frozen=True)
class Flips:
    """What two runs of the same draws come to.

    Attributes:
        completions: In all.
        differing: Of them that are not the same in both.
        tokens: Compared, the first that differs of a completion among them.
    """

    completions: int
    differing: int
    tokens: int

    def __str__(self) -> str:
        rate = self.differing / self.tokens
        return f"{self.differing} of {self.completions} completions differ, {rate:.1e} per token"


def flips(roles: RoleModel, prompts: Sequence[list[int]], tokenizer: Any, longest: int) -> Flips:
    """Draw the same completions `MANY` and `FEW` rows side by side.

    Args:
        roles: A model with the role `policy`.
        prompts: Token ids.
        tokenizer: The model's.
        longest: Tokens of the longest completion.
    """
    drawn = []
    for rows in (MANY, FEW):
        settings = GenerationSettings(max_new_tokens=longest, batch_size=rows)
        draws = keyed_draws(7, range(len(prompts)))
        found = sample(roles, "policy", prompts, settings, tokenizer, completions=K, draws=draws)
        drawn.append([each.ids for own in found for each in own])
    pairs = list(zip(*drawn, strict=True))
    same = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))) for a, b in pairs]
    differing = sum(a != b for a, b in pairs)
    return Flips(len(pairs), differing, sum(same) + differing)
