"""REINFORCE++: token rewards summed to the end of the completion, normalised over all tokens of the rollout.

    r_t = -beta kl_t (+ score on the last token),   A_t = sum over s >= t of gamma^(s-t) r_s           `baseline: none`
    A_t = score - mean score of the prompt                                                             `baseline: group`
    A   = (A - mean) / std over all tokens of the rollout
    L   = mean over tokens of max(-A rho, -A clip(rho, 1 - c, 1 + c)),   rho_t = pi(y_t) / pi_old(y_t)

With the prompt's mean as a baseline the KL is a term of its own, beta mean over tokens of d^2/2.
*Source*: arXiv:2501.03262, section 3. OpenRLHF, the authors' code, takes the biased variance, verl the unbiased one;
here the unbiased one, unless `unbiased_variance: false`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from align.methods import method
from align.methods.ops import (
    clipped,
    gae,
    group_mean,
    kl_estimate,
    rollout_metrics,
    token_rewards,
    whiten,
    with_entropy,
)
from align.spec.base import Unread
from align.spec.online import Clipped, EntropyBonus, PenalisedKL, RolloutStage
from align.types import Advantages, Batch, LossOutput, Needs, Rollout, RolloutLogps, Term


class ReinforcePP(RolloutStage, PenalisedKL, Clipped, EntropyBonus):
    """Settings of `kind: reinforce_pp`."""

    unread: ClassVar[tuple[Unread, ...]] = tuple(
        Unread(
            field,
            lambda stage: stage.baseline == "group",
            "with `baseline: group` the KL is a term of the loss, by k2, and rewards are not discounted",
            "remove it, or write `baseline: none`",
        )
        for field in ("gamma", "kl_estimator", "kl_target")
    )

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    completions: int = Field(default=1, ge=1)
    """Completions per prompt."""
    baseline: Literal["none", "group"] = "none"
    """Whether the mean score of the prompt's completions is taken off first; there have to be two or more."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """What tokens are averaged over."""
    unbiased_variance: bool = True
    """Whether the variance is divided by one less than there are tokens."""

    @model_validator(mode="after")
    def _compared(self) -> ReinforcePP:
        if self.baseline == "group" and self.completions < 2:
            raise ValueError("`baseline: group` compares the completions of a prompt: write `completions: 2` or more")
        return self


def reinforce_pp_advantages(rollout: Rollout, config: ReinforcePP) -> Advantages:
    """Returns or centred scores, normalised."""
    if config.baseline == "group":
        found = (rollout.scores - group_mean(rollout.scores, rollout.prompt))[rollout.owner]
    else:
        rewards = token_rewards(rollout, config.kl_estimator)
        found = gae(rewards, torch.zeros_like(rewards), rollout.length, gamma=config.gamma, lam=1.0)
    return Advantages(whiten(found, rollout.kept_tokens, unbiased=config.unbiased_variance))


@method(
    ReinforcePP,
    batch=Batch.ROLLOUT,
    needs={Needs.TOKEN_LOGPS},
    reference=True,
    advantages=reinforce_pp_advantages,
    source="arXiv:2501.03262, section 3",
)
def reinforce_pp_loss(batch: RolloutLogps, config: ReinforcePP) -> LossOutput:
    """Clipped loss of every token.

    Args:
        batch: Tokens of a rollout; log-probabilities in nats.
        config: Reads `clip`, `aggregation`, `baseline`, `beta`, `entropy_weight`.

    Returns:
        The term `policy`, with `baseline: group` also `kl`, and `entropy` if it has a weight.

    Example:
        >>> one = torch.ones(2)
        >>> batch = RolloutLogps(-one, -one, 3 * one, torch.tensor([0, 0]), torch.tensor([2]), torch.ones(1))
        >>> reinforce_pp_loss(batch, ReinforcePP(prompts="p", scorers=["s"], reference=None)).loss.item()
        -3.0
    """
    loss, cut = clipped(batch.policy, batch.old, batch.advantages, config.clip, config.clip)
    terms = {"policy": _aggregated(loss, batch, config)}
    if config.baseline == "group" and config.pull and batch.reference is not None:
        terms["kl"] = _aggregated(kl_estimate(batch.policy, batch.reference, "k2"), batch, config, config.beta)
    return LossOutput(with_entropy(terms, batch, config.entropy_weight), rollout_metrics(batch, cut))


def _aggregated(values: Tensor, batch: RolloutLogps, config: ReinforcePP, coefficient: float = 1.0) -> Term:
    if config.aggregation == "token_mean":
        return Term(values * batch.token_weight, batch.token_weight, coefficient)
    return Term(batch.by_completion(values) / batch.length * batch.weight, batch.weight, coefficient)
