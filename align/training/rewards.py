"""Rewards of many completions under a role with a scalar head, without gradient, by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.data.chat import Example
from align.logps import Packing, empty_pack, last_rewards, pack_examples
from align.training import collectives


@torch.no_grad()
def completion_rewards(
    roles: Any, role: str, examples: Sequence[Example], pack_tokens: int, packing: Packing = "rows"
) -> list[tuple[float, ...]]:
    """The reward of every completion of every example, the same list on every rank.

    Each rank computes a slice; ranks with fewer packs run empty ones, because ZeRO-3 gathers parameters in every
    forward. The model is in eval mode afterwards.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
        role: One of its roles with a head.
        examples: The same on every rank.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out.
    """
    roles.eval()
    rank, world = collectives.rank(), collectives.world_size()
    device = next(roles.parameters()).device
    own = examples[rank::world]
    packs = pack_examples(own, pack_tokens, packing=packing)
    rounds = int(collectives.gather_rows([len(packs)], device).max())
    part: list[tuple[float, ...]] = [()] * len(own)
    for i in range(rounds):
        pack = packs[i] if i < len(packs) else empty_pack(0)
        values = roles(role, last_rewards, pack.to(device)).tolist()
        for e in pack.examples:
            k = len(own[e].completions)
            part[e], values = tuple(values[:k]), values[k:]
    result: list[tuple[float, ...]] = [()] * len(examples)
    for r, rows in enumerate(collectives.gather_objects(part)):
        result[r::world] = rows
    return result
