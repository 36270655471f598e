"""RLOO: REINFORCE on whole completions, each with the mean reward of the prompt's other completions as its baseline.

    R_i = score_i - beta sum_t kl_t,    A_i = R_i - mean over j != i of R_j
    L   = mean over completions of -A_i S_i                                                 (`ratio: none`)
    L   = mean of max(-A_i rho_i, -A_i clip(rho_i, 1 - c, 1 + c)),  rho_i = exp(S_i - S_i,old)   (`ratio: sequence`)

S is the summed log-probability of a completion. In the state it was drawn from both forms have the same gradient, and
the second the value -mean A, which is 0: the loss tells nothing of progress.
*Source*: arXiv:2402.14740, eq. 8. The clipped ratio of whole completions is TRL's, whose default it is; its option to
divide advantages by their standard deviation is `normalise_advantages` here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from align.methods import method
from align.methods.ops import clipped, group_mean, kl_estimate, rollout_metrics, with_entropy
from align.spec.base import Unread, added
from align.spec.online import Clipped, EntropyBonus, PenalisedKL, RolloutStage
from align.spec.stages import Engined
from align.types import Advantages, Batch, LossOutput, Needs, Rollout, RolloutLogps, Term


class RLOO(RolloutStage, PenalisedKL, Clipped, EntropyBonus, Engined):
    """Settings of `kind: rloo`."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread("clip", lambda rloo: rloo.ratio == "none", "there is no ratio to clip", "write `ratio: sequence`"),
    )

    kind: Literal["rloo"] = "rloo"
    engine: Literal["align", "trl"] = added("align")
    """What trains the stage: align's own trainer, or TRL's, as a peer to check it against (needs the extra `trl`)."""
    completions: int = Field(default=4, ge=2)
    """Completions per prompt; each is the others' baseline."""
    ratio: Literal["sequence", "none"] = "sequence"
    """Whether later updates of a rollout are corrected by the clipped ratio of whole completions."""
    normalise_advantages: bool = False
    """Divide advantages by their standard deviation over the rollout, after their mean is taken off. Both are taken
    over the completions that are not left out."""


def rloo_advantages(rollout: Rollout, config: RLOO) -> Advantages:
    """The same for every token of a completion."""
    rewards = rollout.scores
    if rollout.beta and rollout.reference is not None:
        assert rollout.logps is not None
        kl = kl_estimate(rollout.logps, rollout.reference, config.kl_estimator)
        rewards = rewards - rollout.beta * torch.zeros_like(rewards).index_add(0, rollout.owner, kl)
    k = torch.bincount(rollout.prompt)[rollout.prompt].to(rewards.dtype)
    advantages = (rewards - group_mean(rewards, rollout.prompt)) * k / (k - 1)
    if config.normalise_advantages:
        some = advantages[rollout.kept] if rollout.kept.sum() > 1 else advantages
        advantages = (advantages - some.mean()) / (some.std() + 1e-4)
    return Advantages(advantages[rollout.owner])


@method(
    RLOO,
    batch=Batch.ROLLOUT,
    needs={Needs.TOKEN_LOGPS},
    reference=True,
    advantages=rloo_advantages,
    source="arXiv:2402.14740, eq. 8",
)
def rloo_loss(batch: RolloutLogps, config: RLOO) -> LossOutput:
    """One value per completion.

    Args:
        batch: Tokens of a rollout; the advantages of a completion's tokens are equal.
        config: Reads `ratio`, `clip`, `entropy_weight`.

    Returns:
        The term `policy`, and `entropy` if it has a weight.

    Example:
        >>> one = torch.ones(2)
        >>> batch = RolloutLogps(-one, -one, 3 * one, torch.tensor([0, 0]), torch.tensor([2]), torch.ones(1))
        >>> rloo_loss(batch, RLOO(prompts="p", scorers=["s"], reference=None, ratio="none")).loss.item()
        6.0
    """
    advantages = batch.by_completion(batch.advantages.detach()) / batch.length
    nothing = torch.zeros_like(advantages)
    if config.ratio == "none":
        loss, cut = -advantages * batch.by_completion(batch.policy), nothing
    else:  # differences are summed, not sums subtracted: over a thousand tokens in fp32 that is off by 4e-4
        log_ratio = batch.by_completion(batch.policy - batch.old.detach())
        loss, cut = clipped(log_ratio, nothing, advantages, config.clip, config.clip)
    terms = {"policy": Term(loss * batch.weight, batch.weight)}
    return LossOutput(with_entropy(terms, batch, config.entropy_weight), rollout_metrics(batch, cut))
