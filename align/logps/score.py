"""Log-probabilities, or rewards, of many examples under one role, without gradient, in this process alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.data.chat import Example
from align.logps.head import last_rewards, token_logps
from align.logps.pack import Packing, pack_examples


@torch.no_grad()
def completion_logps(
    roles: Any, role: str, examples: Sequence[Example], pack_tokens: int, packing: Packing = "rows"
) -> list[tuple[float, ...]]:
    """Summed log-probabilities of every completion of every example, in nats.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
        role: Which of its roles computes.
        examples: Any number of examples.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out, of those that `choose_packing` found the model able to.

    Returns:
        One tuple per example, one number per completion.
    """
    device = next(roles.parameters()).device
    result: list[tuple[float, ...]] = [()] * len(examples)
    for pack in pack_examples(examples, pack_tokens, packing=packing):
        pack = pack.to(device)
        totals = pack.sum_by_completion(roles(role, token_logps, pack)).total.tolist()
        for i in pack.examples:
            k = len(examples[i].completions)
            result[i], totals = tuple(totals[:k]), totals[k:]
    return result


@torch.no_grad()
def completion_scores(
    roles: Any, role: str, examples: Sequence[Example], pack_tokens: int, packing: Packing = "rows"
) -> list[tuple[float, ...]]:
    """Rewards of every completion of every example, under a role with a scalar head.

    Args:
        roles: A `RoleModel`, bare.
        role: One of its roles with a head.
        examples: Any number of examples.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out, of those that `choose_packing` found the model able to.

    Returns:
        One tuple per example, one number per completion.
    """
    device = next(roles.parameters()).device
    result: list[tuple[float, ...]] = [()] * len(examples)
    for pack in pack_examples(examples, pack_tokens, packing=packing):
        values = roles(role, last_rewards, pack.to(device)).tolist()
        for i in pack.examples:
            k = len(examples[i].completions)
            result[i], values = tuple(values[:k]), values[k:]
    return result
