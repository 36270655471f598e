"""Small tensor functions that several methods share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from align.types import Logps, PairedLogps, Term

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
