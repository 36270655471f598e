"""Several roles' numbers for many examples, without gradient, every rank for its own examples in equal steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.logps import Packing, empty_pack, pack_examples
from align.training import collectives

Reading = tuple[str, Callable[..., Tensor]]
"""A role, and what is computed under it of a pack: one number per completion, or one per trained token."""


@torch.no_grad()
def run_passes(
    model: Any, readings: Sequence[Reading], examples: Sequence[Example], pack_tokens: int, packing: Packing = "rows"
) -> list[list[Tensor]]:
    """What each reading gives for each example, on the CPU in fp32.

    Ranks with fewer packs run empty ones, because ZeRO-3 gathers parameters in every forward.

    Args:
        model: A `RoleModel`, bare or wrapped by DDP or DeepSpeed; in eval mode.
        readings: Roles and functions.
        examples: This rank's own.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out.

    Returns:
        One list per reading, with one tensor per example: its completions, or their tokens one after the other.
    """
    found: list[list[Tensor]] = [[torch.zeros(0)] * len(examples) for _ in readings]
    if not readings:
        return found
    device = next(model.parameters()).device
    packs = pack_examples(examples, pack_tokens, packing=packing)
    (role, function), *beside = readings
    for i in range(int(collectives.gather_rows([len(packs)], device).max())):
        pack = (packs[i] if i < len(packs) else empty_pack(0)).to(device)
        given = model(role, function, pack, beside=tuple(beside)) if beside else (model(role, function, pack),)
        own = [examples[e] for e in pack.examples]
        tokens = [sum(sum(c.mask) for c in e.completions) for e in own]
        for which, values in enumerate(given):
            sizes = tokens if len(values) == sum(tokens) else [len(e.completions) for e in own]
            for e, part in zip(pack.examples, values.float().cpu().split(sizes), strict=True):
                found[which][e] = part
    return found
