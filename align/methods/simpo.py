"""SimPO: a preference loss without a reference, on log-probabilities per token and with a margin to win by.

    L = -log sigmoid(beta (a_w - a_l - g)),   a = log pi(y) / |y|,   g = gamma / beta

*Source*: arXiv:2405.14734, eq. 6, which has gamma; the authors' code and the table of their settings have the ratio g,
as here. Their class defaults are beta 2 and g 0.25; the default here is their Llama-3-Base run. TRL's CPOTrainer with
`loss_type="simpo"` adds a likelihood term unless `cpo_alpha=0`, and its `simpo_gamma` is gamma.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat

from align.methods import method
from align.methods.ops import paired_metrics
from align.spec.stages import PairedStage
from align.types import Batch, LossOutput, Needs, PairedLogps


class SimPO(PairedStage):
    """Settings of `kind: simpo`."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Scale of the implicit reward; multiplies nats per token."""
    gamma_ratio: NonNegativeFloat = 0.5
    """Margin to win by, gamma / beta, in nats per token."""


@method(SimPO, batch=Batch.PAIRED, needs={Needs.LOGPS}, reference=False, source="arXiv:2405.14734, eq. 6")
def simpo_loss(logps: PairedLogps, config: SimPO) -> LossOutput:
    """Logistic loss on the margin of the mean log-probabilities.

    Args:
        logps: `chosen` and `rejected`, each [B] pairs, totals in nats; `weight` [B].
        config: Reads `beta` and `gamma_ratio`.

    Returns:
        One term per pair; metrics are the implicit rewards `beta * a`.

    Example:
        >>> import torch
        >>> from align.types import Logps
        >>> row = lambda total: Logps(torch.tensor([total]), torch.tensor([2.0]))
        >>> pair = PairedLogps(row(-1.7), row(-2.6), torch.ones(1))
        >>> round(simpo_loss(pair, SimPO(data="d")).loss.item(), 6)
        0.744397
    """
    chosen, rejected = config.beta * logps.chosen.mean, config.beta * logps.rejected.mean
    loss = -F.logsigmoid(chosen - rejected - config.beta * config.gamma_ratio)
    return LossOutput.of_examples(loss, weight=logps.weight, metrics=paired_metrics(logps, chosen, rejected))
