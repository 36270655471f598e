"""Rewards of many completions under a role with a scalar head, without gradient, by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.chat import Example
from align.logps import Packing, last_rewards
from align.training import collectives
from align.training.passes import run_passes


def completion_rewards(
    roles: Any, role: str, examples: Sequence[Example], pack_tokens: int, packing: Packing = "rows"
) -> list[tuple[float, ...]]:
    """The reward of every completion of every example, the same list on every rank.

    Each rank computes a slice. The model is in eval mode afterwards.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
        role: One of its roles with a head.
        examples: The same on every rank.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out.
    """
    roles.eval()
    rank, world = collectives.rank(), collectives.world_size()
    (found,) = run_passes(roles, [(role, last_rewards)], examples[rank::world], pack_tokens, packing)
    result: list[tuple[float, ...]] = [()] * len(examples)
    for r, rows in enumerate(collectives.gather_objects([tuple(each.tolist()) for each in found])):
        result[r::world] = rows
    return result
