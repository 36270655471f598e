"""Direct preference optimisation: a loss on the log-ratio margin against a frozen reference, or against none.

    h = r_w - r_l,   r = log pi(y) - log ref(y), by sum or by token mean; without a reference log ref = 0
    L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)                         sigmoid
    L = (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)           robust
    L = max(0, 1 - beta h)                                                            rso

Log-probabilities are summed over the completion including its EOS.
*Source*: arXiv:2305.18290, eq. 7; the label smoothing e is the conservative DPO of its authors. TRL 1.16 accepts
`label_smoothing` with its sigmoid loss and does not read it; here it is read. `robust` (arXiv:2403.00409) takes the
bias of flipped labels out, so it may be negative. `rso` is the normalised hinge of arXiv:2309.06657, which TRL calls
`hinge`: SLiC-HF, for which it is often taken, has no reference and another term (`kind: slic`). The token mean is the
length-normalised DPO of arXiv:2411.15124, TRL's `sigmoid_norm`; it wants a larger beta, of some units. Without a
reference the loss is what the authors' repository calls `reference_free`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from align.methods import method
from align.methods.ops import log_ratio, paired_metrics
from align.spec.base import PolicyRef, Unread
from align.spec.stages import Engined, PairedStage, Referenced
from align.types import Batch, LossOutput, Needs, PairedLogps


class DPO(PairedStage, Referenced, Engined):
    """Settings of `kind: dpo`."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "label_smoothing",
            lambda dpo: dpo.loss == "rso" and dpo.label_smoothing > 0,
            "the hinge of `loss: rso` does not smooth labels",
            "remove it, or write `loss: sigmoid` or `loss: robust`",
        ),
    )

    kind: Literal["dpo"] = "dpo"
    reference: PolicyRef | None  # type: ignore[assignment]  # wider than other methods': null is an answer too
    """The frozen policy: a stage, declared and never guessed; `null` is DPO without a reference."""
    loss: Literal["sigmoid", "robust", "rso"] = "sigmoid"
    """Logistic, logistic without the bias of flipped labels, or RSO's hinge (which is not SLiC's)."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; multiplies nats."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""
    reduction: Literal["sum", "token_mean"] = "sum"
    """How log-ratios are reduced over the completion: nats, or nats per token."""


@method(DPO, batch=Batch.PAIRED, needs={Needs.LOGPS}, reference=True, source="arXiv:2305.18290, eq. 7")
def dpo_loss(logps: PairedLogps, config: DPO) -> LossOutput:
    """DPO in its three forms.

    Args:
        logps: `chosen`, `rejected` and `reference` (or None), each [B] pairs, totals in nats; `weight` [B].
        config: Reads `loss`, `beta`, `label_smoothing` and `reduction`.

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
    frozen = logps.reference
    chosen = config.beta * log_ratio(logps.chosen, frozen.chosen if frozen else None, config.reduction)
    rejected = config.beta * log_ratio(logps.rejected, frozen.rejected if frozen else None, config.reduction)
    loss = _loss(chosen - rejected, config)
    return LossOutput.of_examples(loss, weight=logps.weight, metrics=paired_metrics(logps, chosen, rejected))


def _loss(margin: Tensor, config: DPO) -> Tensor:
    """[B] loss of each pair from `beta h` [B]."""
    if config.loss == "rso":
        return F.relu(1 - margin)
    e = config.label_smoothing
    right, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return (1 - e) * right + e * flipped if config.loss == "sigmoid" else ((1 - e) * right - e * flipped) / (1 - 2 * e)
