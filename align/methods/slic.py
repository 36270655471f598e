"""SLiC-HF: better candidates of a prompt are made likelier than worse ones by a margin, close to a target.

    L_x = mean over i better than j of max(0, delta d_ij - S_i + S_j)  -  lambda S_target
    L   = mean over prompts x of L_x

S is the log-probability of a completion, d_ij is 1, or the number of ranks between the two. There is no reference.
*Source*: arXiv:2305.10425, whose examples are single pairs: the mean over pairs is their objective for a list, and
lambda is not reported (HALOs: 0.1). With `pair_reduction: sum` and `rank_margin` it is the list-wise loss of
arXiv:2210.00045 and BRIO (arXiv:2203.16804). The authors' code is not public; TRL's `hinge` is another loss (`kind:
dpo`, `loss: rso`). `regularisation: 0` leaves the ranking alone, and nothing keeps both likelihoods from falling.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from align.errors import DataError
from align.methods import method
from align.methods.ops import RankedPairs, Reduction, best_of, levels_of, reduced
from align.spec.base import Unread
from align.spec.stages import RankedStage
from align.types import Batch, LossOutput, Needs, RankedLogps, Term


def _without_target(field: str) -> Unread:
    return Unread(field, lambda slic: slic.regularisation == 0, "`regularisation: 0` has no target", "remove it")


class SLiC(RankedStage):
    """Settings of `kind: slic`."""

    unread: ClassVar[tuple[Unread, ...]] = (
        _without_target("target"),
        _without_target("target_reduction"),
        Unread(
            "rank_margin",
            lambda slic: slic.rank_margin and slic.pairs != "all",
            "margins that grow with the rank belong to `pairs: all`",
            "remove it, or write `pairs: all`",
        ),
    )

    kind: Literal["slic"] = "slic"
    delta: PositiveFloat = 1.0
    """Margin to win by, in the unit of S; 0.1 to 1 with `reduction: token_mean`."""
    pairs: Literal["all", "best_worst", "adjacent"] = "all"
    """Which candidates are compared: all, the best and the worst, or neighbours in the ranking."""
    pair_reduction: Literal["mean", "sum"] = "mean"
    """How a prompt's pairs are reduced."""
    rank_margin: bool = False
    """Whether a pair's margin is delta times the ranks between the two; equal scores share a rank."""
    reduction: Reduction = "sum"
    """How log-probabilities are reduced over a candidate: nats, or nats per token."""
    regularisation: NonNegativeFloat = 0.1
    """Weight lambda of the target's likelihood; to be tuned together with `target_reduction`."""
    target: Literal["best", "column"] = "best"
    """What to stay close to: the best candidate (of equal ones the first), or the data's `target`."""
    target_reduction: Reduction = "sum"
    """How the target's log-probability is reduced: nats, or nats per token."""


@method(SLiC, batch=Batch.RANKED, needs={Needs.LOGPS}, reference=False, source="arXiv:2305.10425")
def slic_loss(logps: RankedLogps, config: SLiC) -> LossOutput:
    """Hinge over ranked pairs and likelihood of the target.

    Args:
        logps: `candidates`, `scores` and `prompt` of C candidates, `target` [B] if the data has it, totals in nats;
            `weight` of B prompts.
        config: Reads all settings of its own.

    Returns:
        The terms `calibration` and, with a `regularisation`, `target`, both one unit per prompt, also of a prompt
        whose candidates are all equal. Implicit rewards are S; `pairs/active` is the share of pairs with a gradient.

    Example:
        >>> import torch
        >>> from align.types import Logps
        >>> candidates = Logps(torch.tensor([-20.0, -20.4]), torch.tensor([9.0, 9.0]))
        >>> one, owner = torch.ones(1), torch.tensor([0, 0])
        >>> batch = RankedLogps(candidates, torch.tensor([1.0, 0.0]), owner, one, one)
        >>> round(slic_loss(batch, SLiC(data="d")).loss.item(), 6)
        2.6
    """
    every = RankedPairs.of(logps.scores, logps.prompt, len(logps.weight))
    level, s = levels_of(logps.scores, logps.prompt), reduced(logps.candidates, config.reduction)
    apart = level[None, :] - level[:, None]
    pairs = _chosen(every, apart, config)
    margin = config.delta * apart.to(s.dtype) if config.rank_margin and config.pairs == "all" else config.delta
    hinge = F.relu(margin - s[:, None] + s[None, :])
    calibration = pairs.mean(hinge) if config.pair_reduction == "mean" else pairs.total(hinge)
    terms = {"calibration": Term(calibration * logps.weight, logps.weight)}
    if config.regularisation:
        likelihood = _target(logps, every.owner, config) * logps.weight
        terms["target"] = Term(-likelihood, logps.weight, config.regularisation)
    return LossOutput(terms, pairs.metrics(s) | {"pairs/active": pairs.active(hinge)})


def _chosen(every: RankedPairs, apart: Tensor, config: SLiC) -> RankedPairs:
    """The pairs that are compared; `apart` [C, C] is the number of ranks between two candidates."""
    if config.pairs == "adjacent":
        return every.within(apart == 1)
    if config.pairs == "best_worst":
        return every.within(~every.mask.any(0)[:, None] & ~every.mask.any(1)[None, :])
    return every


def _target(logps: RankedLogps, owner: Tensor, config: SLiC) -> Tensor:
    """[B] log-probabilities of the completions to stay close to."""
    if config.target == "best":
        return reduced(logps.candidates, config.target_reduction)[best_of(logps.scores, owner)]
    if logps.target is None:
        raise DataError("`target: column`, and the data has no target", fix="add the column, or write `target: best`")
    return reduced(logps.target, config.target_reduction)
