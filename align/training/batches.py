"""From the sums of a pack to the batch that a method sees, one function per batch kind. B examples, C completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.types import Batch, Logps, PairedLogps, RankedLogps, RankedRewards, TokensLogps, UnpairedLogps


def batch_of(
    kind: Batch,
    examples: Sequence[Example],
    logps: Logps,
    *,
    reference: Logps | None = None,
    prompt: Logps | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Any:
    """The batch of a method that reads log-probabilities.

    Args:
        kind: The method's batch kind.
        examples: B examples.
        logps: Their completions under the policy, [C], example after example.
        reference: The same under the reference, if the method reads one.
        prompt: The prompts' own tokens under the policy, [B], if the method needs them.
        statistics: What the method's statistic came to over the whole step.
    """
    weight = _row([e.weight for e in examples], logps.total)
    if kind is Batch.TOKENS:
        return TokensLogps(logps, weight)
    if kind is Batch.PAIRED:
        frozen = None if reference is None else PairedLogps(*_sides(reference), weight)
        return PairedLogps(*_sides(logps), weight, frozen, prompt)
    if kind is Batch.UNPAIRED:
        label = _row([e.scores[0] for e in examples], logps.total)
        return UnpairedLogps(logps, label, weight, reference, statistics if statistics is not None else {})
    candidate, scores, owner = _candidates(examples, logps.total)
    targets = [len(e.completions) > len(e.scores) for e in examples]
    target = _take(logps, ~candidate) if any(targets) else None
    if target is not None and not all(targets):
        raise ValueError("some examples of the batch have a target and some have none")
    prompt_length = _row([len(e.prompt_ids) for e in examples], logps.total)
    return RankedLogps(_take(logps, candidate), scores, owner, weight, prompt_length, target)


def rewards_of(examples: Sequence[Example], rewards: Tensor) -> RankedRewards:
    """The batch of a method that reads the rewards [C] of candidates."""
    candidate, scores, owner = _candidates(examples, rewards)
    weight, margin = _row([e.weight for e in examples], rewards), _row([e.margin for e in examples], rewards)
    return RankedRewards(rewards[candidate], scores, owner, weight, margin)


def _candidates(examples: Sequence[Example], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which completions are candidates [C'], their scores [C] and the example of each [C]."""
    is_candidate = [k < len(e.scores) for e in examples for k in range(len(e.completions))]
    scores = _row([score for e in examples for score in e.scores], like)
    owner = [b for b, e in enumerate(examples) for _ in e.scores]
    return (
        torch.tensor(is_candidate, dtype=torch.bool, device=like.device),
        scores,
        torch.tensor(owner, dtype=torch.long, device=like.device),
    )


def _sides(logps: Logps) -> tuple[Logps, Logps]:
    """[2B] completions, chosen first in each example, as chosen and rejected [B]."""
    return Logps(logps.total[0::2], logps.length[0::2]), Logps(logps.total[1::2], logps.length[1::2])


def _take(logps: Logps, mask: Tensor) -> Logps:
    return Logps(logps.total[mask], logps.length[mask])


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
