"""Small tensor functions that several methods share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from align.types import Logps, PairedLogps, Rollout, RolloutLogps, Term

Reduction = Literal["sum", "token_mean"]


def reduced(logps: Logps, reduction: Reduction) -> Tensor:
    """[B] nats of completions, or nats per token.

    Example:
        >>> logps = Logps(torch.tensor([-6.0]), torch.tensor([4.0]))
        >>> reduced(logps, "sum").item(), reduced(logps, "token_mean").item()
        (-6.0, -1.5)
    """
    return logps.mean if reduction == "token_mean" else logps.total


def log_ratio(policy: Logps, reference: Logps | None, reduction: Reduction) -> Tensor:
    """[B] log pi(y) - log ref(y), in nats or nats per token; log pi(y) alone without a reference."""
    own = reduced(policy, reduction)
    return own if reference is None else own - reduced(reference, reduction).detach()


def paired_metrics(logps: PairedLogps, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What every preference method logs.

    Args:
        logps: The batch, B pairs.
        chosen: [B] implicit rewards of the chosen completions, in the method's own unit.
        rejected: [B] the same of the rejected ones.

    Returns:
        name -> [B] values. Chosen and rejected are told apart, because the likelihood of both may fall.
    """
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": (chosen > rejected).to(torch.float32),
        "logps/chosen": logps.chosen.total,
        "logps/rejected": logps.rejected.total,
    }


@dataclass(frozen=True)
class RankedPairs:
    """All pairs (i, j) of C candidates of B prompts where i is strictly better than j and answers the same prompt.

    Attributes:
        mask: [C, C] whether (i, j) is a pair. Equal scores make none.
        owner: [B, C] whether the prompt is the candidate's.
    """

    mask: Tensor
    owner: Tensor

    @classmethod
    def of(cls, scores: Tensor, prompt: Tensor, prompts: int) -> RankedPairs:
        """The pairs that `scores` [C] make among the candidates of each `prompt` [C], of which there are `prompts`.

        Example:
            >>> RankedPairs.of(torch.tensor([2.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 1]), 2).count.tolist()
            [2, 0]
        """
        better = (scores[:, None] > scores[None, :]) & (prompt[:, None] == prompt[None, :])
        return cls(better, prompt[None, :] == torch.arange(prompts, device=prompt.device)[:, None])

    @property
    def count(self) -> Tensor:
        """[B] number of pairs of each prompt."""
        return self.by_prompt(self.mask.sum(1))

    def within(self, mask: Tensor) -> RankedPairs:
        """Those of the pairs that are in `mask` [C, C]."""
        return replace(self, mask=self.mask & mask)

    def total(self, values: Tensor) -> Tensor:
        """[B] sum over the pairs of each prompt of `values` [C, C]."""
        return self.by_prompt(torch.where(self.mask, values, 0).sum(1))

    def mean(self, values: Tensor) -> Tensor:
        """[B] mean over the pairs of each prompt of `values` [C, C]; 0 where there is none."""
        return self.total(values) / self.count.clamp(min=1)

    def by_prompt(self, values: Tensor) -> Tensor:
        """[B] sums of `values` [C]; by a mask and not by index_add, whose order of addition varies on a GPU."""
        return torch.where(self.owner, values[None, :], 0).sum(1)

    def metrics(self, values: Tensor) -> dict[str, Term]:
        """What every method on ranked candidates logs.

        Args:
            values: [C] rewards of the candidates, implicit or not, in the method's own unit.

        Returns:
            name -> term per prompt: the mean over its pairs, and weight 0 where there is none.
        """
        better, worse = torch.broadcast_tensors(values.detach()[:, None], values.detach()[None, :])
        weight = (self.count > 0).to(values.dtype)
        pairs = {"chosen": better, "rejected": worse, "margin": better - worse}
        pairs["accuracy"] = (better > worse).to(values.dtype)
        return {f"rewards/{name}": Term(self.mean(each), weight) for name, each in pairs.items()}

    def active(self, loss: Tensor) -> Term:
        """The share of pairs that a hinge `loss` [C, C] is not 0 for: no other gives a gradient."""
        count = self.count.to(loss.dtype)
        return Term(self.total((loss.detach() > 0).to(loss.dtype)), count)


def best_of(scores: Tensor, owner: Tensor) -> Tensor:
    """[B] index into C of the best candidate of each prompt; of several equal ones the first.

    Args:
        scores: [C] finite scores of the candidates.
        owner: [B, C] whether the prompt is the candidate's; each has one at least.

    Example:
        >>> owner = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]]).bool()
        >>> best_of(torch.tensor([0.0, 2.0, 2.0, -1.0]), owner).tolist()
        [1, 3]
    """
    return torch.where(owner, scores[None, :], -torch.inf).argmax(1)


def levels_of(scores: Tensor, prompt: Tensor) -> Tensor:
    """[C] rank of each candidate among those of its prompt, from 0; equal scores share one.

    Args:
        scores: [C] scores of the candidates.
        prompt: [C] which prompt each answers.

    Example:
        >>> levels_of(torch.tensor([1.0, 3.0, 3.0, 0.5, 7.0]), torch.tensor([0, 0, 0, 0, 1])).tolist()
        [1, 0, 0, 2, 0]
    """
    same = prompt[:, None] == prompt[None, :]
    repeated = ((scores[:, None] == scores[None, :]) & same).tril(-1).any(1)
    better = (scores[:, None] > scores[None, :]) & same
    return (better & ~repeated[:, None]).sum(0)


# Rollouts: N tokens of C completions, one completion after the other ------------------------------------------------


def kl_estimate(logps: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """[N] estimates of KL(policy || reference) from the policy's own samples, in nats.

    With d = log pi - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    *Source*: J. Schulman, "Approximating KL divergence", 2020.

    Args:
        logps: [N] under the policy.
        reference: [N] under the reference; no gradient goes there.
        estimator: `k1`, `k2` or `k3`.

    Example:
        >>> [round(kl_estimate(torch.tensor(-1.0), torch.tensor(-1.2), k).item(), 6) for k in ("k1", "k2", "k3")]
        [0.2, 0.02, 0.018731]
    """
    d = logps - reference.detach()
    return {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def whiten(values: Tensor, kept: Tensor | None = None, *, keep_mean: bool = False, unbiased: bool = True) -> Tensor:
    """[N] values with mean 0 and variance 1, or with their own mean, over those of them that are kept.

    *Source*: TRL and verl take the unbiased variance, OpenAI's code and OpenRLHF the biased one.

    Args:
        values: [N].
        kept: [N] which of them mean and variance are taken from; all if absent.
        keep_mean: Whether the mean is put back.
        unbiased: Whether the variance is divided by one less than there are.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0]), unbiased=False).tolist()
        [-1.0, 1.0]
    """
    some = values if kept is None or not kept.any() else values[kept]
    mean = some.mean()
    variance = some.var(unbiased=unbiased) if len(some) > 1 else torch.zeros((), dtype=values.dtype)
    white = (values - mean) / torch.sqrt(variance + 1e-8)
    return white + mean if keep_mean else white


def token_rewards(rollout: Rollout, estimator: str) -> Tensor:
    """[N] minus beta times the KL of each token, and the score on the last one of each completion."""
    rewards = torch.zeros(len(rollout.owner), dtype=rollout.scores.dtype)
    if rollout.beta and rollout.reference is not None:
        assert rollout.logps is not None
        rewards = -rollout.beta * kl_estimate(rollout.logps, rollout.reference, estimator)
    return rewards.index_add(0, rollout.last, rollout.scores)


def gae(rewards: Tensor, values: Tensor, length: Tensor, *, gamma: float, lam: float) -> Tensor:
    """[N] generalised advantage estimates; the value after the last token of a completion is 0.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}
    *Source*: arXiv:1506.02438, eq. 16. With values of 0 and lam = 1 it is the discounted sum of rewards to come.

    Args:
        rewards: [N].
        values: [N] of the states before the tokens.
        length: [C] tokens of each completion.
        gamma: Discount.
        lam: 0 trusts the values, 1 the rewards.

    Example:
        >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([2]), gamma=1.0, lam=1.0).tolist()
        [0.5, 0.5]
    """
    rows = torch.nn.utils.rnn.pad_sequence(
        list(torch.stack([rewards, values], dim=1).split(length.tolist())), batch_first=True
    )
    r, v = rows.unbind(-1)
    found = torch.zeros_like(r)
    ahead = torch.zeros(len(r), dtype=r.dtype)
    after = torch.zeros(len(r), dtype=r.dtype)
    for t in range(r.shape[1] - 1, -1, -1):
        ahead = r[:, t] + gamma * after - v[:, t] + gamma * lam * ahead
        found[:, t], after = ahead, v[:, t]
    inside = torch.arange(r.shape[1]) < length[:, None]
    return found[inside]


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """[C] mean over the group that each of `values` [C] belongs to."""
    count = torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add(0, group, torch.ones_like(values))
    return (torch.zeros_like(count).index_add(0, group, values) / count)[group]


def group_std(values: Tensor, group: Tensor, *, unbiased: bool = True) -> Tensor:
    """[C] standard deviation of the group that each of `values` [C] belongs to; 0 for a group of one."""
    square = group_mean((values - group_mean(values, group)) ** 2, group)
    count = torch.bincount(group)[group]
    return torch.sqrt(square * count / (count - 1).clamp(min=1) if unbiased else square)


def clipped(policy: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) with rho = exp(policy - old), and where the clipping cuts.

    No gradient goes to what was found out at the rollout.
    *Source*: arXiv:1707.06347, eq. 7.

    Args:
        policy: Log-probabilities of tokens, or of whole completions.
        old: The same under the policy that drew them.
        advantages: Of the same shape.
        low: How far below 1 the ratio may go.
        high: How far above.

    Returns:
        The loss, and 1 where it has no gradient because of the clipping.
    """
    ratio, advantages = torch.exp(policy - old.detach()), advantages.detach()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, held), (held > free).to(policy.dtype).detach()


def rollout_metrics(batch: RolloutLogps, cut: Tensor) -> dict[str, Term]:
    """What every method on rollouts logs, as means over tokens.

    Args:
        batch: The batch.
        cut: Where the clipping cuts, [N] tokens or [C] completions.
    """
    weight, log_ratio = batch.token_weight, (batch.policy - batch.old).detach()
    found = {
        "policy/clip_fraction": Term(cut * (own := weight if len(cut) == len(weight) else batch.weight), own),
        "policy/approx_kl": Term(log_ratio**2 / 2 * weight, weight),
    }
    if batch.entropy is not None:
        found["policy/entropy"] = Term(batch.entropy.detach() * weight, weight)
    if batch.reference is not None:
        kl = batch.by_completion((batch.policy - batch.reference).detach())
        found["policy/kl"] = Term(kl * batch.weight, batch.weight)
    return found


def with_entropy(terms: dict[str, Term], batch: RolloutLogps, weight: float) -> dict[str, Term]:
    """The terms of a loss and, where it has a weight, the entropy that is taken off."""
    if not weight:
        return terms
    assert batch.entropy is not None
    return terms | {"entropy": Term(batch.entropy * batch.token_weight, batch.token_weight, -weight)}
