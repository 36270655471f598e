"""GRPO: every token of a completion gets how much better it scored than the prompt's other completions.

    A_i = (score_i - mean of the prompt) / (std of the prompt + 1e-4)                        `scale: std`
    l_t = max(-A rho_t, -A clip(rho_t, 1 - c, 1 + c_high)) + beta kl_t,   rho_t = pi(y_t) / pi_old(y_t)
    L   = mean over completions of the mean over their tokens of l_t                        `aggregation: sequence_mean`
    L   = mean over all tokens                                                              `token_mean`
    L   = sum over tokens / (completions x longest possible completion)                     `constant`

Dr. GRPO is `scale: none, aggregation: constant, beta: 0`, the loss of DAPO `aggregation: token_mean, clip_high: 0.28,
beta: 0`. The standard deviation is the unbiased one, as in TRL, verl and OpenRLHF; the paper does not say. The KL is a
term of the loss, not of the reward.
*Source*: arXiv:2402.03300, eq. 3 and 4; Dr. GRPO: arXiv:2503.20783; DAPO: arXiv:2503.14476. TRL 1.16 has beta 0 and
`token_mean` by default and multiplies the KL by the ratio (`kl_ratio` here).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from align.methods import method
from align.methods.ops import clipped, group_mean, group_std, kl_estimate, rollout_metrics, with_entropy
from align.spec.base import Unread, added
from align.spec.online import Anchored, Clipped, EntropyBonus, RolloutStage, unanchored
from align.spec.stages import Engined
from align.types import Advantages, Batch, LossOutput, Needs, Rollout, RolloutLogps, Term


class GRPO(RolloutStage, Anchored, Clipped, EntropyBonus, Engined):
    """Settings of `kind: grpo`."""

    unread: ClassVar[tuple[Unread, ...]] = (
        unanchored("beta"),
        *(
            Unread(field, lambda grpo: grpo.pull == 0, "no KL is taken", "name a `reference`, and a beta above 0")
            for field in ("kl_estimator", "kl_ratio")
        ),
    )

    kind: Literal["grpo"] = "grpo"
    engine: Literal["align", "trl"] = added("align")
    """What trains the stage: align's own trainer, or TRL's, as a peer to check it against (needs the extra `trl`)."""
    completions: int = Field(default=8, ge=2)
    """Completions per prompt."""
    scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the standard deviation of the prompt's scores."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """What tokens are averaged over; the mean of a completion's own tokens favours long wrong ones."""
    clip_high: PositiveFloat | None = None
    """How far the ratio may be above 1; `clip` if absent."""
    beta: NonNegativeFloat = 0.04
    """Weight of the KL to the reference in the loss, per nat."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """d^2/2 or exp(-d) - 1 + d of the log-ratio d; only the gradient of k2 is that of the KL."""
    kl_ratio: bool = False
    """Multiply the KL of a token by its ratio, which corrects for the policy having moved since the rollout."""


def grpo_advantages(rollout: Rollout, config: GRPO) -> Advantages:
    """The same for every token of a completion; 0 where all scores of a prompt are equal."""
    advantages = rollout.scores - group_mean(rollout.scores, rollout.prompt)
    if config.scale == "std":
        advantages = advantages / (group_std(rollout.scores, rollout.prompt) + 1e-4)
    return Advantages(advantages[rollout.owner])


@method(
    GRPO,
    batch=Batch.ROLLOUT,
    needs={Needs.TOKEN_LOGPS},
    reference=True,
    advantages=grpo_advantages,
    source="arXiv:2402.03300, eq. 3 and 4",
)
def grpo_loss(batch: RolloutLogps, config: GRPO) -> LossOutput:
    """Clipped loss of every token, and the KL to the reference.

    Args:
        batch: Tokens of a rollout; log-probabilities in nats.
        config: Reads `clip`, `clip_high`, `beta`, `kl_estimator`, `kl_ratio`, `aggregation`, `entropy_weight` and
            `generation.max_new_tokens`.

    Returns:
        The term `policy`, `kl` if there is a reference and a beta, and `entropy` if it has a weight.

    Example:
        >>> one = torch.ones(2)
        >>> batch = RolloutLogps(-one, -one, 3 * one, torch.tensor([0, 0]), torch.tensor([2]), torch.ones(1))
        >>> grpo_loss(batch, GRPO(prompts="p", scorers=["s"], reference=None)).loss.item()
        -3.0
    """
    high = config.clip if config.clip_high is None else config.clip_high
    loss, cut = clipped(batch.policy, batch.old, batch.advantages, config.clip, high)
    terms = {"policy": _aggregated(loss, batch, config)}
    if config.pull and batch.reference is not None:
        kl = kl_estimate(batch.policy, batch.reference, config.kl_estimator)
        if config.kl_ratio:
            kl = kl * torch.exp(batch.policy - batch.old)
        terms["kl"] = _aggregated(kl, batch, config, config.beta)
    return LossOutput(with_entropy(terms, batch, config.entropy_weight), rollout_metrics(batch, cut))


def _aggregated(values: Tensor, batch: RolloutLogps, config: GRPO, coefficient: float = 1.0) -> Term:
    """[N] values of tokens as a term."""
    if config.aggregation == "token_mean":
        return Term(values * batch.token_weight, batch.token_weight, coefficient)
    width = batch.length if config.aggregation == "sequence_mean" else config.generation.max_new_tokens
    return Term(batch.by_completion(values) / width * batch.weight, batch.weight, coefficient)
