"""Supervised fine-tuning: next-token cross-entropy on the completion.

    L = - sum_i sum_t m_it log p(y_it | y_i<t) / sum_it m_it

*Source*: the token mean is taken over the whole optimizer step, as Hugging Face Trainer and TRL do with
`num_items_in_batch`; averaging the means of micro-batches is a different loss. The sequence mean weighs every example
alike, whatever its length.
"""

from __future__ import annotations

from typing import Literal

from align.methods import method
from align.spec.stages import Engined, TokensStage
from align.types import Batch, LossOutput, Needs, Term, TokensLogps


class SFT(TokensStage, Engined):
    """Settings of `kind: sft`."""

    kind: Literal["sft"] = "sft"
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Whether every token or every sequence has the same weight."""
    loss_on: Literal["completion", "all"] = "completion"
    """Train on the assistant's turns, or on every token (plain language modelling)."""


@method(SFT, batch=Batch.TOKENS, needs={Needs.LOGPS}, reference=False, source="arXiv:2203.02155, step 1")
def sft_loss(logps: TokensLogps, config: SFT) -> LossOutput:
    """Negative log-likelihood, by token or by sequence.

    Args:
        logps: `policy.total` [B] in nats, `policy.length` [B] in tokens, `weight` [B].
        config: Reads `reduction`.

    Returns:
        One term `loss`; the metric `nll_per_token` is the token mean whatever the reduction.

    Example:
        >>> import torch
        >>> from align.types import Logps
        >>> policy = Logps(torch.tensor([-3.0, -2.0]), torch.tensor([3.0, 1.0]))
        >>> batch = TokensLogps(policy, torch.ones(2))
        >>> sft_loss(batch, SFT(data="d")).loss.item()
        1.25
        >>> sft_loss(batch, SFT(data="d", reduction="sequence_mean")).loss.item()
        1.5
    """
    policy, length = logps.policy, logps.policy.length.to(logps.policy.total.dtype)
    metrics = {"nll_per_token": Term(-policy.total.detach(), length)}
    if config.reduction == "token_mean":
        term = Term(-policy.total * logps.weight, length * logps.weight)
    else:
        term = Term(-policy.mean * logps.weight, logps.weight)
    return LossOutput({"loss": term}, metrics)
