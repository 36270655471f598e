"""KTO: completions that are desirable or not, without pairs, each against what the policy gains on average.

    r = log pi(y) - log ref(y),   z0 = max(0, mean over the step of log pi(y') - log ref(y'))
    L = w_D sigmoid(-beta (r - z0)) for a desirable y,   w_U sigmoid(-beta (z0 - r)) for an undesirable one

y' is the completion of another prompt; z0 estimates the KL divergence to the reference and has no gradient.
*Source*: arXiv:2402.01306, eq. 8; log-probabilities are summed over the completion including its EOS. The authors' code
and TRL take z0 from each micro-batch and average it over ranks; here it is the mean of the whole optimizer step,
whatever the packs. With unequal numbers n of the two, the paper wants w_D n_D / (w_U n_U) between 1 and 3/2 (its
first version, and TRL: 4/3).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat

from align.methods import method
from align.methods.ops import log_ratio
from align.spec.stages import Engined, Referenced, UnpairedStage
from align.types import Batch, LossOutput, Needs, Term, UnpairedLogps


class KTO(UnpairedStage, Referenced, Engined):
    """Settings of `kind: kto`."""

    version: ClassVar[int] = 2

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; multiplies nats."""
    desirable_weight: PositiveFloat = 1.0
    """Weight w_D of the loss of desirable completions."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight w_U of the loss of undesirable ones."""


def kto_statistic(logps: UnpairedLogps, config: KTO) -> dict[str, Term]:
    """The mean log-ratio of mismatched completions, one unit per row.

    Args:
        logps: `policy` and `reference` [B] of other prompts' completions, totals in nats; `weight` [B].
        config: Nothing is read.

    Returns:
        `kl`, in nats, not yet clamped at 0: only the mean of the whole step is.

    Example:
        >>> from align.types import Logps
        >>> row = lambda *totals: Logps(torch.tensor(totals), torch.ones(len(totals)))
        >>> other = UnpairedLogps(row(-30.0, -28.0), torch.ones(2), torch.ones(2), row(-31.0, -28.5))
        >>> kto_statistic(other, KTO(data="d", reference="sft"))["kl"].value.item()
        0.75
    """
    return {"kl": Term(log_ratio(logps.policy, logps.reference, "sum").detach() * logps.weight, logps.weight)}


@method(
    KTO,
    batch=Batch.UNPAIRED,
    needs={Needs.LOGPS},
    reference=True,
    source="arXiv:2402.01306, eq. 8",
    statistic=kto_statistic,
)
def kto_loss(logps: UnpairedLogps, config: KTO) -> LossOutput:
    """Value of each completion against the step's mean, with one weight per label.

    Args:
        logps: `policy` and `reference` [B], totals in nats; `label` and `weight` [B]; `statistics["kl"]` in nats.
        config: Reads `beta`, `desirable_weight` and `undesirable_weight`.

    Returns:
        One term per row. The weights of the labels scale losses and not the divisor, as in the paper. Metrics are the
        implicit rewards `beta * r` and log-probabilities of desirable (chosen) and undesirable (rejected) rows, and z0.

    Example:
        >>> from align.types import Logps
        >>> row = lambda total: Logps(torch.tensor([total]), torch.ones(1))
        >>> one = torch.ones(1)
        >>> batch = UnpairedLogps(row(-10.0), one, one, row(-11.5), {"kl": torch.tensor(0.75)})
        >>> round(kto_loss(batch, KTO(data="d", reference="sft")).loss.item(), 6)
        0.481259
    """
    good, kl = logps.label, logps.statistics["kl"].detach().clamp(min=0)
    ratio = log_ratio(logps.policy, logps.reference, "sum")
    share = config.desirable_weight * good + config.undesirable_weight * (1 - good)
    loss = share * torch.sigmoid(-config.beta * (2 * good - 1) * (ratio - kl))
    metrics = {"kl": Term(kl.to(ratio.dtype).expand_as(ratio), torch.ones_like(ratio))}
    for name, values in (("rewards", config.beta * ratio.detach()), ("logps", logps.policy.total.detach())):
        metrics[f"{name}/chosen"] = Term(values * good, good)
        metrics[f"{name}/rejected"] = Term(values * (1 - good), 1 - good)
    return LossOutput({"loss": Term(loss * logps.weight, logps.weight)}, metrics)
