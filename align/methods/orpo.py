"""ORPO: supervised fine-tuning on the chosen completion and, without a reference, a penalty on the odds of the other.

    a = log pi(y) / |y|,   log odds(y) = a - log(1 - exp a)
    L = - sum_i log pi(y_w) / sum_i |y_w|  -  lambda mean_i log sigmoid(log odds(y_w) - log odds(y_l))

*Source*: arXiv:2403.07691, eq. 6 and 7; lambda is `odds_weight` here and `beta` in TRL. The likelihood is a token mean
over the optimizer step, as in TRL's experimental trainer, the odds ratio a mean over pairs. The authors' code and TRL
take the likelihood of prompt and completion (`loss_on: all`), the paper that of the completion. The authors' code
sums in bf16, takes the log of a sigmoid, and masks by the id of the padding token; none of this is done here.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from align.methods import method
from align.methods.ops import paired_metrics
from align.spec.stages import PairedStage
from align.types import Batch, Logps, LossOutput, Needs, PairedLogps, Term, example_metrics

LARGEST_MEAN = -1e-6
"""Nats per token: a completion that is certain has infinite odds."""


class ORPO(PairedStage):
    """Settings of `kind: orpo`."""

    kind: Literal["orpo"] = "orpo"
    odds_weight: PositiveFloat = 0.1
    """Weight lambda of the odds ratio beside the likelihood; 0.1 to 0.25 in the paper."""
    loss_on: Literal["completion", "all"] = "completion"
    """Whose likelihood is raised: the chosen completion's, or its prompt's too. Odds are always of completions."""


@method(
    ORPO,
    batch=Batch.PAIRED,
    needs={Needs.LOGPS, Needs.PROMPT_LOGPS},
    reference=False,
    source="arXiv:2403.07691, eq. 6 and 7",
)
def orpo_loss(logps: PairedLogps, config: ORPO) -> LossOutput:
    """Likelihood of the chosen completion and odds ratio.

    Args:
        logps: `chosen` and `rejected`, each [B] pairs, and `prompt` [B] with `loss_on: all`, totals in nats; `weight`
            [B].
        config: Reads `odds_weight` and `loss_on`.

    Returns:
        The term `nll` per token and the term `odds` per pair; the implicit rewards are log odds.

    Example:
        >>> row = lambda total: Logps(torch.tensor([total]), torch.tensor([2.0]))
        >>> out = orpo_loss(PairedLogps(row(-1.7), row(-2.6), torch.ones(1)), ORPO(data="d"))
        >>> round(out.terms["nll"].value.item(), 6), round(out.terms["odds"].value.item(), 6)
        (0.85, 0.040671)
    """
    trained, length, weight = logps.chosen.total, logps.chosen.length, logps.weight
    if config.loss_on == "all":
        assert logps.prompt is not None
        trained, length = trained + logps.prompt.total, length + logps.prompt.length
    chosen, rejected = log_odds(logps.chosen), log_odds(logps.rejected)
    terms = {
        "nll": Term(-trained * weight, length * weight),
        "odds": Term(-F.logsigmoid(chosen - rejected) * weight, weight, config.odds_weight),
    }
    metrics = example_metrics(paired_metrics(logps, chosen, rejected))
    metrics["nll_per_token"] = Term(-logps.chosen.total.detach(), logps.chosen.length)
    return LossOutput(terms, metrics)


def log_odds(logps: Logps) -> Tensor:
    """[B] log(p / (1 - p)) of the completions' mean probability per token p, the exponential of their token mean.

    Example:
        >>> round(log_odds(Logps(torch.tensor([-2.0 * 0.6931472]), torch.tensor([2.0]))).item(), 5)
        0.0
    """
    mean = logps.mean.clamp(max=LARGEST_MEAN)
    return mean - torch.log(-torch.expm1(mean))
