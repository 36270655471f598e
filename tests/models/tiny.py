"""What the tests of the model layer share apart from fixtures."""

from __future__ import annotations

import torch

from align.models import RoleModel
from align.spec.model import LoraSettings

LORA = LoraSettings(rank=8, alpha=16)


def randomise(roles: RoleModel, role: str, seed: int) -> None:
    """A fresh adapter is the identity; noise in B makes roles tell apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in roles.tensors(role).items():
        if "lora_B" in name:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)


def token_ids(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(causal_lm, ids: torch.Tensor) -> torch.Tensor:
    """The way log-probabilities are computed: body, then head."""
    return causal_lm.lm_head(causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state)


def loss(causal_lm, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits(causal_lm, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
