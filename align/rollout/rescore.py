"""Log-probabilities of completions that another engine has drawn, computed by the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.data.chat import Completion, Example
from align.logps import pack_examples, token_logps

PACK_TOKENS = 8192
"""Token budget of one forward pass."""


@torch.no_grad()
def rescored(
    roles: Any, role: str, prompts: Sequence[list[int]], drawn: Sequence[Sequence[list[int]]], temperature: float
) -> list[list[list[float]]]:
    """What `Sampled.logps` wants of every token of every completion of every prompt.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP; in eval mode.
        role: Which of its roles computes.
        prompts: Token ids.
        drawn: For each prompt its completions.
        temperature: That they were drawn at; 0 is as 1.
    """
    examples = [
        Example(i, prompt, tuple(Completion(ids, [True] * len(ids), False) for ids in own), 1.0)
        for i, (prompt, own) in enumerate(zip(prompts, drawn, strict=True))
    ]
    found: list[list[list[float]]] = [[] for _ in prompts]
    device = next(roles.parameters()).device
    compute = lambda causal_lm, pack, *_: token_logps(causal_lm, pack, temperature or 1.0)  # noqa: E731
    for pack in pack_examples(examples, PACK_TOKENS):
        values = iter(roles(role, compute, pack.to(device)).tolist())
        for i in pack.examples:
            found[i] = [[next(values) for _ in ids] for ids in drawn[i]]
    return found
