"""Reward model: a scalar head learns to score the better of two completions higher, for pairs and for ranked lists.

    L_x = mean over i better than j of  -log sigmoid(r_i - r_j - m) + c (r_i + r_j)^2
    L   = mean over prompts x of L_x

*Source*: arXiv:2203.02155, eq. 1: all pairs of a prompt belong to one example, and every prompt counts alike. Equal
scores make no pair, and the divisor is the number of pairs that are left, where the equation as printed has
K (K - 1) / 2; TRL and OpenRLHF know pairs only, for which there is no difference. The margin m is Llama 2's
(arXiv:2307.09288, eq. 2); the centring c is arXiv:2312.09244's, written as in TRL 1.16.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from align.methods import method
from align.methods.ops import RankedPairs
from align.spec.base import Unread
from align.spec.stages import Engined, GenerationSettings, RankedStage
from align.types import Batch, LossOutput, Needs, RankedRewards, Term


class Reward(RankedStage, Engined):
    """Settings of `kind: reward`."""

    unread: ClassVar[tuple[Unread, ...]] = tuple(
        Unread(
            field, lambda reward: reward.normalise != "samples", "no samples are drawn", "write `normalise: samples`"
        )
        for field in ("normalise_prompts", "generation")
    )

    kind: Literal["reward"] = "reward"
    produces = "reward"
    margin: Literal["none", "column", "score"] = "none"
    """By how much the better one has to win: not at all, by the data's `margin`, or by the difference of the scores."""
    centring: NonNegativeFloat = 0.0
    """Coefficient that holds the sum of a pair's rewards near 0; 0.01 is usual, 0 leaves it out."""
    normalise: Literal["data", "samples", "none"] = "data"
    """What the finished model's rewards get mean 0 and standard deviation 1 on: the completions it was trained on,
    samples of the policy it starts from (as arXiv:1909.08593 does), or nothing."""
    normalise_prompts: PositiveInt = 256
    """Training prompts that samples are drawn for."""
    generation: GenerationSettings = GenerationSettings()
    """How samples are drawn; best as the policy will be sampled that the rewards are for."""


@method(Reward, batch=Batch.RANKED, needs={Needs.REWARDS}, reference=False, source="arXiv:2203.02155, eq. 1")
def reward_loss(batch: RankedRewards, config: Reward) -> LossOutput:
    """Bradley-Terry loss over all pairs of a prompt of which one is strictly better.

    Args:
        batch: `rewards`, `scores` and `prompt` of C candidates, `weight` and `margin` of B prompts.
        config: Reads `margin` and `centring`.

    Returns:
        One term per prompt, `loss`, and another, `centring`, if there is a coefficient; a prompt whose candidates are
        all equal has weight 0. Metrics are means over a prompt's pairs, then over the prompts that have one.

    Example:
        >>> owner, one = torch.tensor([0, 0, 0]), torch.ones(1)
        >>> batch = RankedRewards(torch.tensor([0.3, 0.1, -0.2]), torch.tensor([3.0, 2.0, 2.0]), owner, one, 0 * one)
        >>> round(reward_loss(batch, Reward(data="d")).loss.item(), 6)
        0.536108
    """
    pairs = RankedPairs.of(batch.scores, batch.prompt, len(batch.weight))
    better, worse = batch.rewards[:, None], batch.rewards[None, :]
    weight = batch.weight * (pairs.count > 0)
    loss = pairs.mean(-F.logsigmoid(better - worse - _wanted(batch, config)))
    terms = {"loss": Term(loss * weight, weight)}
    if config.centring:
        terms["centring"] = Term(pairs.mean((better + worse) ** 2) * weight, weight, config.centring)
    return LossOutput(terms, pairs.metrics(batch.rewards))


def _wanted(batch: RankedRewards, config: Reward) -> Tensor:
    """The margin of each pair, [C, 1] or [C, C], in the unit of the rewards."""
    if config.margin == "score":
        return batch.scores[:, None] - batch.scores[None, :]
    column = batch.margin[batch.prompt][:, None]
    return column if config.margin == "column" else torch.zeros_like(column)
