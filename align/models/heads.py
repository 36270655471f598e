"""Scalar heads: one number per hidden state, beside a base and not inside it, so that a base can carry several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORE = "score"
"""What transformers calls the head of a reward model, in its classes and on disk."""


class ScalarHead(nn.Linear):
    """A linear layer without bias from a hidden state to one number, computed in fp32 whatever surrounds it.

    Its weight alone is trained and saved; `mean` and `std` belong to a finished reward model and make its rewards
    (w h - mean) / std.

    Args:
        hidden: H, width of the hidden states.
        device: Where the weight is.
    """

    def __init__(self, hidden: int, device: torch.device | None = None) -> None:
        super().__init__(hidden, 1, bias=False, device=device, dtype=torch.float32)
        self.mean, self.std = 0.0, 1.0

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] hidden states to [..., 1] rewards, fp32."""
        with torch.autocast(states.device.type, enabled=False):
            rewards = F.linear(states.float(), self.weight.float())
        return (rewards - self.mean) / self.std if (self.mean, self.std) != (0.0, 1.0) else rewards

    def reset_parameters(self) -> None:
        """Zeros: PyTorch's own noise would move the global random state."""
        nn.init.zeros_(self.weight)

    def draw(self, seed: int) -> None:
        """Fill the weight with N(0, 1/sqrt(H + 1)) from `seed` alone: the same on every rank.

        *Source*: the released code of arXiv:1909.08593 and arXiv:2009.01325.
        """
        noise = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.weight.copy_(noise / (self.in_features + 1) ** 0.5)
