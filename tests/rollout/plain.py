"""What a rollout has to give, computed one sequence at a time without a cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from align.spec.stages import GenerationSettings


def settings(**changes: Any) -> GenerationSettings:
    return GenerationSettings(**{"max_new_tokens": 24, **changes})


@torch.no_grad()
def logits_after(roles: Any, role: str, ids: list[int]) -> Tensor:
    """[V]"""
    device = next(roles.parameters()).device
    return roles(role, lambda m, *_: m(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1])


def greedy(roles: Any, role: str, prompt: list[int], limit: int, ends: Collection[int]) -> list[int]:
    """The likeliest token, again and again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(logits_after(roles, role, ids).argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def logps(roles: Any, role: str, prompt: list[int], completion: list[int], temperature: float = 1.0) -> list[float]:
    """Of each token of a completion, at a temperature; 0 is as 1."""
    found = []
    for t, token in enumerate(completion):
        scores = logits_after(roles, role, prompt + completion[:t]).float() / (temperature or 1.0)
        found.append(float(scores.log_softmax(-1)[token]))
    return found
