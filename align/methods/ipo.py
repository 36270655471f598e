"""Identity preference optimisation: the log-ratio margin is regressed on a constant, so it cannot grow without bound.

    h = (r_w - r_l),   r = log pi(y) - log ref(y), by token mean or by sum
    L = (h - 1 / (2 tau))^2

*Source*: arXiv:2310.12036, eq. 17. Published code differs in the reduction: the DPO authors' repository and OpenRLHF
sum the log-ratios over the completion, TRL and HALOs average them over tokens (TRL says after asking the authors). It
is a setting here, because the scale of tau depends on it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from align.methods import method
from align.methods.ops import log_ratio, paired_metrics
from align.spec.stages import PairedStage, Referenced
from align.types import Batch, LossOutput, Needs, PairedLogps


class IPO(PairedStage, Referenced):
    """Settings of `kind: ipo`."""

    kind: Literal["ipo"] = "ipo"
    tau: PositiveFloat = 0.1
    """Strength of the pull to the reference; the margin aimed at is 1 / (2 tau)."""
    reduction: Literal["token_mean", "sum"] = "token_mean"
    """How log-ratios are reduced over the completion: nats per token, or nats."""


@method(IPO, batch=Batch.PAIRED, needs={Needs.LOGPS}, reference=True, source="arXiv:2310.12036, eq. 17")
def ipo_loss(logps: PairedLogps, config: IPO) -> LossOutput:
    """Squared distance of the log-ratio margin from 1 / (2 tau).

    Args:
        logps: `chosen`, `rejected` and `reference`, each [B] pairs, totals in nats; `weight` [B].
        config: Reads `tau` and `reduction`.

    Returns:
        One term per pair; metrics are the log-ratios in the unit of the reduction.

    Example:
        >>> import torch
        >>> from align.types import Logps
        >>> row = lambda total: Logps(torch.tensor([total]), torch.tensor([4.0]))
        >>> one = torch.ones(1)
        >>> pair = PairedLogps(row(-12.5), row(-14.0), one, PairedLogps(row(-13.0), row(-13.5), one))
        >>> ipo_loss(pair, IPO(data="d", reference="sft", reduction="sum")).loss.item()
        16.0
    """
    reference = logps.reference
    assert reference is not None
    chosen = log_ratio(logps.chosen, reference.chosen, config.reduction)
    rejected = log_ratio(logps.rejected, reference.rejected, config.reduction)
    margin = chosen - rejected
    metrics = paired_metrics(logps, chosen, rejected)
    return LossOutput.of_examples((margin - 1 / (2 * config.tau)) ** 2, weight=logps.weight, metrics=metrics)
