"""Log-probabilities, or rewards, of many examples under one role, without gradient, in this process alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.logps.head import last_rewards, token_logps
from align.logps.pack import Pack, Packing, pack_examples


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

    def totals(pack: Pack) -> Tensor:
        return pack.sum_by_completion(roles(role, token_logps, pack)).total

    return _by_completion(roles, totals, examples, pack_tokens, packing)


@torch.no_grad()
def completion_scores(
    roles: Any, role: str, examples: Sequence[Example], pack_tokens: int, packing: Packing = "rows"
) -> list[tuple[float, ...]]:
    """Rewards of every completion of every example, under a role with a scalar head; see `completion_logps`."""
    return _by_completion(roles, lambda pack: roles(role, last_rewards, pack), examples, pack_tokens, packing)


def _by_completion(
    roles: Any, values: Callable[[Pack], Tensor], examples: Sequence[Example], pack_tokens: int, packing: Packing
) -> list[tuple[float, ...]]:
    """What `values` [C] gives for the completions of each example, pack after pack."""
    device = next(roles.parameters()).device
    result: list[tuple[float, ...]] = [()] * len(examples)
    for pack in pack_examples(examples, pack_tokens, packing=packing):
        found = values(pack.to(device)).tolist()
        for i in pack.examples:
            k = len(examples[i].completions)
            result[i], found = tuple(found[:k]), found[k:]
    return result
