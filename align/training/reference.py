"""Log-probabilities under the reference: computed once, before the first step, and kept beside the checkpoints."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.data.chat import Example
from align.errors import TrainingError
from align.logps import completion_logps, empty_pack, pack_examples, token_logps
from align.training import collectives

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference per token, in nats, that two passes of the same policy may show."""


def reference_logps(
    roles: Any, role: str, examples: Sequence[Example], pack_tokens: int, cache: Path
) -> list[tuple[float, ...]]:
    """Every example's completions under `role`, read from `cache` or computed by all ranks together.

    Each rank computes a slice; ranks with fewer packs run empty ones, because ZeRO-3 gathers parameters in every
    forward.

    A cache that is damaged, or was made from other token ids, is told and computed again.
    """
    kept = _read(cache, examples)
    if kept is not None:
        return kept
    rank, world = collectives.rank(), collectives.world_size()
    own = list(examples[rank::world])
    packs = len(pack_examples(own, pack_tokens))
    device = next(roles.parameters()).device
    missing = int(collectives.gather_rows([packs], device).max()) - packs
    part = completion_logps(roles, role, own, pack_tokens)
    with torch.no_grad():
        for _ in range(missing):
            roles(role, token_logps, empty_pack(0).to(device))
    result: list[tuple[float, ...]] = [()] * len(examples)
    for r, rows in enumerate(collectives.gather_objects(part)):
        result[r::world] = rows
    if rank == 0:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".part")
        totals = torch.tensor(result, dtype=torch.float64)
        save_file({"totals": totals}, partial, metadata={"digest": _digest(examples, totals)})
        partial.rename(cache)
    collectives.barrier()
    return result


def _read(cache: Path, examples: Sequence[Example]) -> list[tuple[float, ...]] | None:
    if not cache.exists():
        return None
    try:
        with safe_open(cache, "pt") as file:
            totals, digest = file.get_tensor("totals"), (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as error:
        totals, digest = None, str(error)
    if totals is None or digest != _digest(examples, totals):
        logger.warning("%s is damaged or belongs to other examples; it is computed again", cache.name)
        return None
    return [tuple(row) for row in totals.tolist()]


def _digest(examples: Sequence[Example], totals: Tensor) -> str:
    """sha256 of the token ids and of what was computed from them."""
    seen = hashlib.sha256(totals.numpy().tobytes())
    for example in examples:
        seen.update(repr((example.prompt_ids, [(c.ids, c.mask) for c in example.completions])).encode())
    return seen.hexdigest()


def starting_kl(
    roles: Any,
    examples: Sequence[Example],
    references: Sequence[Sequence[float]],
    *,
    pack_tokens: int,
    same: bool,
    dtype: torch.dtype,
) -> float:
    """Compare policy and reference before the first step.

    Args:
        roles: The wrapped model, at step 0.
        examples: A few examples.
        references: Their log-probabilities under the reference.
        pack_tokens: Token budget of one forward pass.
        same: Whether policy and reference are the same stage, and so must agree.
        dtype: Compute dtype; decides the tolerance.

    Returns:
        Mean of log policy - log reference per completion, in nats: zero when the two are the same, and on text that the
        reference did not write only a hint of the KL when they differ.

    Raises:
        TrainingError: If they are the same stage and disagree, for then the reference is not what the recipe says.
    """
    policy = completion_logps(roles, "policy", examples, pack_tokens)
    differences, worst = [], 0.0
    for example, own, other in zip(examples, policy, references, strict=True):
        for completion, p, r in zip(example.completions, own, other, strict=True):
            differences.append(p - r)
            worst = max(worst, abs(p - r) / max(1, sum(completion.mask)))
    if same and worst > TOLERANCE[dtype]:
        raise TrainingError(
            f"policy and reference are the same stage but differ by {worst:.3g} nats per token before the first step",
            fix="report this: the reference is not where the policy starts (dropout, wrong adapter, wrong base)",
        )
    return sum(differences) / len(differences)
