"""PPO: policy and critic learn from the policy's own completions, scored by a reward model, held close to a reference.

    r_t   = -beta kl_t  (+ score on the last token),   kl_t from log pi_old(y_t) - log ref(y_t)
    A, R  = GAE(r, V_old),   A + V_old;   A whitened over the whole rollout
    L_pg  = mean over tokens of max(-A rho, -A clip(rho, 1 - c, 1 + c)),   rho = pi(y_t) / pi_old(y_t)
    L_v   = 1/2 mean over tokens of max((V - R)^2, (clip(V, V_old - v, V_old + v) - R)^2)
    L     = L_pg + w L_v - e H + x L_ptx

V_t is what the critic says in the state from which y_t is drawn; after the last token it is 0. The score stands on the
last token that was drawn, as in OpenAI's code, OpenRLHF and TRL up to 0.11; later TRL puts it one step behind.
*Source*: arXiv:1707.06347, eq. 7 and 9; arXiv:2203.02155, eq. 2; the details that decide success: arXiv:2403.17031.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat

from align.methods import method
from align.methods.ops import clipped, gae, rollout_metrics, token_rewards, whiten, with_entropy
from align.spec.base import DataRef, Unread
from align.spec.online import Clipped, EntropyBonus, PenalisedKL, RolloutStage
from align.types import Advantages, Batch, LossOutput, Needs, Rollout, RolloutLogps, Term


class PPO(RolloutStage, PenalisedKL, Clipped, EntropyBonus):
    """Settings of `kind: ppo`."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread("ptx_weight", lambda ppo: ppo.ptx is None, "there is no text to mix in", "name data in `ptx`"),
        Unread(
            "critic_start",
            lambda ppo: ppo.reward is None and ppo.critic_start == "reward",
            "there is no reward model to start from",
            "write `critic_start: policy`",
        ),
    )

    kind: Literal["ppo"] = "ppo"
    completions: int = Field(default=1, ge=1)
    """Completions per prompt; the critic makes the baseline, so one is enough."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """Of the advantage estimate: 0 trusts the critic, 1 the rewards."""
    whiten_advantages: bool = True
    """Give the advantages of a rollout mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Give its token rewards variance 1, their mean kept."""
    value_clip: PositiveFloat | None = 0.2
    """How far the critic may move from what it said at the rollout before its gradient is cut off; null: no limit."""
    value_weight: PositiveFloat = 0.1
    """Weight of the critic's loss."""
    critic_start: Literal["reward", "policy"] = "reward"
    """What the critic's adapter starts as: the reward model with its head, or the policy with a head of zeros. A reward
    model on a base of its own cannot be started from: the policy is then."""
    critic_learning_rate: PositiveFloat | None = None
    """`train.learning_rate` if absent."""
    ptx: Annotated[str, DataRef(("conversation", "text"))] | None = None
    """Data whose likelihood is kept up beside the reward (PPO-ptx)."""
    ptx_weight: NonNegativeFloat = 1.0
    """Weight of its mean negative log-likelihood per token."""


def ppo_advantages(rollout: Rollout, config: PPO) -> Advantages:
    """Generalised advantages of the KL-shaped rewards, whitened, and the returns from before they were."""
    assert rollout.values is not None
    rewards = token_rewards(rollout, config.kl_estimator)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollout.kept_tokens, keep_mean=True)
    found = gae(rewards, rollout.values, rollout.length, gamma=config.gamma, lam=config.lam)
    returns = found + rollout.values
    return Advantages(whiten(found, rollout.kept_tokens) if config.whiten_advantages else found, returns)


@method(
    PPO,
    batch=Batch.ROLLOUT,
    needs={Needs.TOKEN_LOGPS, Needs.VALUES},
    reference=True,
    advantages=ppo_advantages,
    source="arXiv:1707.06347, eq. 7 and 9",
)
def ppo_loss(batch: RolloutLogps, config: PPO) -> LossOutput:
    """Clipped policy loss and clipped value loss, as means over tokens.

    Args:
        batch: Tokens of a rollout; log-probabilities in nats, values and returns in units of the score.
        config: Reads `clip`, `value_clip`, `value_weight`, `entropy_weight`.

    Returns:
        The terms `policy` and `value`, and `entropy` if it has a weight.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> batch = RolloutLogps(
        ...     policy=-one, old=-one, advantages=2 * one, owner=torch.tensor([0]), length=torch.tensor([1]),
        ...     weight=one, values=zero, old_values=zero, returns=one,
        ... )
        >>> ppo_loss(batch, PPO(prompts="p", scorers=["s"], reference=None)).loss.item()
        -1.9500000476837158
    """
    weight = batch.token_weight
    assert batch.values is not None
    assert batch.old_values is not None
    assert batch.returns is not None
    loss, cut = clipped(batch.policy, batch.old, batch.advantages, config.clip, config.clip)
    returns = batch.returns.detach()
    error = (batch.values - returns) ** 2
    moved = torch.zeros_like(error)
    if config.value_clip is not None:
        old = batch.old_values.detach()
        held = (torch.clamp(batch.values, old - config.value_clip, old + config.value_clip) - returns) ** 2
        moved, error = (held > error).to(error.dtype), torch.maximum(error, held)
    terms = {
        "policy": Term(loss * weight, weight),
        "value": Term(error / 2 * weight, weight, config.value_weight),
    }
    metrics = rollout_metrics(batch, cut) | {
        "value/clip_fraction": Term(moved.detach() * weight, weight),
        "value/loss": Term(error.detach() / 2 * weight, weight),
    }
    return LossOutput(with_entropy(terms, batch, config.entropy_weight), metrics)
