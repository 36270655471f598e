"""One token per row from logits and a uniform number: greedy, or by inverse transform sampling.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from align.spec.stages import GenerationSettings

BLOCK = 64
"""Weights that are summed before anything is cumulated; a table of V cumulated fp64 numbers would be slow to make."""
BELOW = 1 - 1e-15
"""Keeps a number below the sum it is a share of, so that no token without weight is ever found."""


class Sampler:
    """Draws a token for each row.

    Args:
        settings: Reads `temperature`, `top_k` and `top_p`; tokens are cut in that order.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self.temperature, self.top_k, self.top_p = settings.temperature, settings.top_k, settings.top_p

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token and needs no numbers."""
        return self.temperature == 0

    def __call__(self, logits: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw.

        Args:
            logits: [B, V].
            draws: [B] uniform numbers in [0, 1), fp64; None if greedy.

        Returns:
            [B] tokens and [B] log-probabilities in nats, fp32, at the temperature and before any token is cut.
        """
        scores = logits.float()
        if not self.greedy and self.temperature != 1:
            scores = scores / self.temperature
        top = scores.amax(-1, keepdim=True)
        if self.greedy:
            tokens = scores.argmax(-1, keepdim=True)
            return tokens[:, 0], (top - scores.logsumexp(-1, keepdim=True))[:, 0]
        assert draws is not None
        weights = (scores - top).exp_()
        if self.top_k is None and self.top_p == 1:
            tokens, total = invert(weights, draws)
        else:
            tokens, total = self._cut(weights, draws), weights.sum(-1, dtype=torch.float64)
        logps = (scores.gather(-1, tokens[:, None]) - top)[:, 0] - total.log().float()
        return tokens, logps

    def _cut(self, weights: Tensor, draws: Tensor) -> Tensor:
        """[B] tokens from the likeliest ones only."""
        k = weights.shape[-1] if self.top_k is None else min(self.top_k, weights.shape[-1])
        if k < weights.shape[-1]:
            kept, ids = weights.topk(k)
        else:
            kept, ids = weights.sort(dim=-1, descending=True, stable=True)
        if self.top_p < 1:
            shares = kept / kept.sum(-1, keepdim=True)
            before = shares.cumsum(-1) - shares
            kept = kept.masked_fill(before >= self.top_p, 0.0)  # keeps the token that crosses top_p
        chosen, _ = invert(kept, draws)
        return ids.gather(-1, chosen[:, None])[:, 0]


def invert(weights: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The place in each row at which the cumulated weights pass a share of their sum.

    Sums of blocks are cumulated and searched, then the one block: the same place as in a table of all cumulated
    weights, for a fraction of the memory traffic.

    Args:
        weights: [B, N] not negative.
        draws: [B] shares in [0, 1), fp64.

    Returns:
        [B] places and [B] sums, fp64.

    Example:
        >>> invert(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.3], dtype=torch.float64))[0]
        tensor([2])
    """
    last, padding = weights.shape[-1] - 1, -weights.shape[-1] % BLOCK
    weights = F.pad(weights, (0, padding)) if padding else weights
    blocks = weights.unflatten(-1, (-1, BLOCK))
    cumulated = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = cumulated[:, -1:]
    wanted = draws[:, None] * (total * BELOW)
    # The bounds are for weights that are no numbers: what they lead to is found by whoever reads the log-probability.
    block = torch.searchsorted(cumulated, wanted, right=True).clamp(max=blocks.shape[1] - 1)
    before = F.pad(cumulated, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    wanted = torch.minimum(wanted - before, inside[:, -1:] * BELOW)
    place = block * BLOCK + torch.searchsorted(inside, wanted, right=True)
    return place.clamp(max=last)[:, 0], total[:, 0]
