"""RRHF: candidates of a prompt are ordered by their mean log-probability as their scores say, and the best is imitated.

    p_i = log pi(y_i) / |y_i|
    L_x = w sum over i worse than j of max(0, p_i - p_j)  -  log pi(y_b) (/ |y_b|),   b the best
    L   = mean over prompts x of L_x

Equal scores make no pair; of equal best candidates the first is imitated. There is no reference and no margin.
*Source*: arXiv:2304.05302, eq. 1 to 5, where the last term is a sum (`ft_reduction: sum`); it is then tens to hundreds
of nats beside a ranking of some units, so the mean over the best candidate's own tokens is the default. The authors'
code turns the -100 of its labels into 0 in place before it counts, so that both terms are divided by the padded width
of the prompt's rows: the prompt and its longest candidate. `compat: official` does the same. The authors' w is 1 in the
scripts that they ran, and 100 by default.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat

from align.methods import method
from align.methods.ops import RankedPairs, best_of, reduced
from align.spec.base import Unread
from align.spec.stages import RankedStage
from align.types import Batch, Logps, LossOutput, Needs, RankedLogps, Term


class RRHF(RankedStage):
    """Settings of `kind: rrhf`."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "ft_reduction",
            lambda rrhf: rrhf.compat == "official",
            "`compat: official` divides by the padded width",
            "remove it, or write `compat: none`",
        ),
    )

    kind: Literal["rrhf"] = "rrhf"
    rank_weight: NonNegativeFloat = 1.0
    """Weight w of the ranking beside the imitation of the best candidate."""
    ft_reduction: Literal["token_mean", "sum"] = "token_mean"
    """How the best candidate's likelihood is reduced over its tokens; the paper has the sum."""
    compat: Literal["none", "official"] = "none"
    """Whether to divide by one width for all candidates of a prompt, as the published code does unintentionally."""


@method(RRHF, batch=Batch.RANKED, needs={Needs.LOGPS}, reference=False, source="arXiv:2304.05302, eq. 1 to 5")
def rrhf_loss(logps: RankedLogps, config: RRHF) -> LossOutput:
    """Ranking of all candidates and likelihood of the best one.

    Args:
        logps: `candidates`, `scores` and `prompt` of C candidates, totals in nats; `weight` of B prompts.
        config: Reads `rank_weight`, `ft_reduction` and `compat`.

    Returns:
        The terms `rank` and `best`, both one unit per prompt, also of a prompt whose candidates are all equal. The
        implicit rewards are p.

    Example:
        >>> candidates = Logps(torch.tensor([-2.25, -3.0]), torch.tensor([3.0, 5.0]))
        >>> owner = torch.tensor([0, 0])
        >>> batch = RankedLogps(candidates, torch.tensor([0.2, -1.0]), owner, torch.ones(1), torch.ones(1))
        >>> round(rrhf_loss(batch, RRHF(data="d")).loss.item(), 6)
        0.9
    """
    pairs = RankedPairs.of(logps.scores, logps.prompt, len(logps.weight))
    best, candidates, reduction = best_of(logps.scores, pairs.owner), logps.candidates, config.ft_reduction
    if config.compat == "official":
        width = logps.prompt_length + torch.where(pairs.owner, candidates.length[None, :], 0).amax(1)
        candidates, reduction = Logps(candidates.total, width[logps.prompt]), "token_mean"
    p, ft = candidates.mean, -reduced(candidates, reduction)[best]
    violation = F.relu(p[None, :] - p[:, None])
    terms = {
        "rank": Term(pairs.total(violation) * logps.weight, logps.weight, config.rank_weight),
        "best": Term(ft * logps.weight, logps.weight),
    }
    chosen = logps.candidates
    metrics = pairs.metrics(p) | {"pairs/active": pairs.active(violation)}
    metrics["nll_per_token"] = Term(-chosen.total.detach()[best], chosen.length[best])
    return LossOutput(terms, metrics)
