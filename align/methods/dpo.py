"""Direct preference optimisation: a logistic loss on the log-ratio margin against a frozen reference.

    h = (log pi(y_w) - log pi(y_l)) - (log ref(y_w) - log ref(y_l))
    L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

Log-probabilities are summed over the completion including its EOS.
*Source*: arXiv:2305.18290, eq. 7; the label smoothing e is the conservative DPO of its authors. TRL 1.16 accepts
`label_smoothing` with its sigmoid loss and does not read it; here it is read.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat

from align.methods import method
from align.methods.ops import paired_metrics
from align.spec.stages import PairedStage, Referenced
from align.types import Batch, LossOutput, Needs, PairedLogps


class DPO(PairedStage, Referenced):
    """Settings of `kind: dpo`."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; multiplies nats."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""


@method(DPO, batch=Batch.PAIRED, needs={Needs.LOGPS}, reference=True, source="arXiv:2305.18290, eq. 7")
def dpo_loss(logps: PairedLogps, config: DPO) -> LossOutput:
    """Sigmoid DPO with label smoothing.

    Args:
        logps: `chosen`, `rejected` and `reference`, each [B] pairs, totals in nats; `weight` [B].
        config: Reads `beta` and `label_smoothing`.

    Returns:
        One term per pair; metrics are the implicit rewards `beta * (log pi - log ref)`, unsmoothed.

    Example:
        >>> import torch
        >>> from align.types import Logps
        >>> row = lambda total: Logps(torch.tensor([total]), torch.tensor([4.0]))
        >>> one = torch.ones(1)
        >>> pair = PairedLogps(row(-12.5), row(-14.0), one, PairedLogps(row(-13.0), row(-13.5), one))
        >>> round(dpo_loss(pair, DPO(data="d", reference="sft")).loss.item(), 6)
        0.644397
    """
    reference = logps.reference
    assert reference is not None
    chosen = config.beta * (logps.chosen.total - reference.chosen.total)
    rejected = config.beta * (logps.rejected.total - reference.rejected.total)
    margin, e = chosen - rejected, config.label_smoothing
    loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
    metrics = paired_metrics(logps, chosen, rejected)
    return LossOutput.of_examples(loss, weight=logps.weight, metrics=metrics)
