"""Pretraining: a small causal language model and its tokenizer, from nothing, on every token.

    L = - sum_it log p(y_it | y_i<t) / N

It makes the base of a recipe that has no model to download: the architecture is random at the start, the tokenizer is
trained once on the stage's own text and kept with the artifact.
*Source*: the loss is SFT's with every token trained.
"""

from __future__ import annotations

from typing import Annotated, Literal

from align.methods import method
from align.methods.sft import SFT, sft_loss
from align.spec.base import DataRef
from align.spec.model import Architecture, TokenizerSettings
from align.spec.stages import TrainedStage
from align.types import Batch, LossOutput, Needs, TokensLogps


class Pretrain(TrainedStage):
    """Settings of `kind: pretrain`."""

    kind: Literal["pretrain"] = "pretrain"
    data: Annotated[str, DataRef(("text", "conversation"))]
    architecture: Architecture = Architecture()
    tokenizer: TokenizerSettings = TokenizerSettings()


@method(Pretrain, batch=Batch.TOKENS, needs={Needs.LOGPS}, reference=False, source="next-token cross-entropy")
def pretrain_loss(logps: TokensLogps, config: Pretrain) -> LossOutput:
    """Token-mean negative log-likelihood of all tokens; `logps.policy.total` [B] in nats.

    Example:
        >>> import torch
        >>> from align.types import Logps
        >>> batch = TokensLogps(Logps(torch.tensor([-3.0, -2.0]), torch.tensor([3.0, 1.0])), torch.ones(2))
        >>> pretrain_loss(batch, Pretrain(data="d")).loss.item()
        1.25
    """
    return sft_loss(logps, SFT(data=config.data))
