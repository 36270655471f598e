"""Batches of random log-probabilities for every batch kind."""

from __future__ import annotations

from typing import Any

import torch

from align.methods import Method
from align.types import Batch, Logps, PairedLogps, TokensLogps


def config_of(method: Method, **settings: Any) -> Any:
    """Settings of a method with every required field filled in."""
    required = {name: "x" for name, f in method.config.model_fields.items() if f.is_required()}
    return method.config(**(required | settings))


def random_logps(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Logps:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 20, (n,), generator=g).to(dtype)
    return Logps(-length * torch.rand(n, generator=g, dtype=dtype) * 3, length)


def random_batch(method: Method, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    g = torch.Generator().manual_seed(seed + 999)
    weight = torch.rand(n, generator=g, dtype=dtype) + 0.5
    if method.batch is Batch.TOKENS:
        return TokensLogps(random_logps(n, seed, dtype), weight)
    chosen, rejected = random_logps(n, seed, dtype), random_logps(n, seed + 1, dtype)
    reference = None
    if method.reference:
        shift = lambda own, s: Logps(own.total + random_logps(n, s, dtype).total * 0.1, own.length)  # noqa: E731
        reference = PairedLogps(shift(chosen, seed + 2), shift(rejected, seed + 3), weight)
    return PairedLogps(chosen, rejected, weight, reference)
