"""Small tensor functions that several methods share."""

from __future__ import annotations

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
