"""Small tensor functions that several methods share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.types import PairedLogps


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
        return self._by_prompt(self.mask.sum(1))

    def sum(self, values: Tensor) -> Tensor:
        """[B] sum over the pairs of each prompt of `values` [C, C]."""
        return self._by_prompt(torch.where(self.mask, values, 0.0).sum(1))

    def mean(self, values: Tensor) -> Tensor:
        """[B] mean over the pairs of each prompt of `values` [C, C]; 0 where there is none."""
        return self.sum(values) / self.count.clamp(min=1)

    def _by_prompt(self, values: Tensor) -> Tensor:
        """[B] sums of `values` [C]; by a mask and not by index_add, whose order of addition varies on a GPU."""
        return torch.where(self.owner, values[None, :], 0).sum(1)
