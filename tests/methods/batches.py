"""Batches of random log-probabilities for every batch kind, parts of them, and what they want."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.methods import Method
from align.spec.online import RolloutStage
from align.types import (
    Batch,
    Logps,
    Needs,
    PairedLogps,
    RankedLogps,
    RankedRewards,
    RolloutLogps,
    TokensLogps,
    UnpairedLogps,
    map_logps,
)
from tests.methods.rollouts import COMPLETIONS, learnt, random_rollout

Rows = slice | Tensor


def config_of(method: Method, **settings: Any) -> Any:
    """Settings of a method with every required field filled in."""
    required: dict[str, Any] = {name: "x" for name, f in method.config.model_fields.items() if f.is_required()}
    if issubclass(method.config, RolloutStage):
        required |= {"scorers": ["x"], "completions": COMPLETIONS}
    return method.config(**(required | settings))


def random_logps(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Logps:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 20, (n,), generator=g).to(dtype)
    return Logps(-length * torch.rand(n, generator=g, dtype=dtype) * 3, length)


def near(own: Logps, seed: int) -> Logps:
    """What another policy, not far away, says of the same completions."""
    return Logps(own.total + random_logps(len(own.total), seed, own.total.dtype).total * 0.1, own.length)


def random_weight(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + 999), dtype=dtype) + 0.5


def random_paired(n: int, seed: int, dtype: torch.dtype = torch.float64, *, reference: bool = True) -> PairedLogps:
    chosen, rejected = random_logps(n, seed, dtype), random_logps(n, seed + 1, dtype)
    weight, prompt = random_weight(n, seed, dtype), random_logps(n, seed + 4, dtype)
    frozen = PairedLogps(near(chosen, seed + 2), near(rejected, seed + 3), weight) if reference else None
    return PairedLogps(chosen, rejected, weight, frozen, prompt)


def random_unpaired(n: int, seed: int, dtype: torch.dtype = torch.float64) -> UnpairedLogps:
    own, label = random_logps(n, seed, dtype), torch.arange(n).remainder(2).to(dtype)
    return UnpairedLogps(own, label, random_weight(n, seed, dtype), near(own, seed + 2))


def random_order(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scores [C] and prompts [C] of 2 to 5 candidates each; some are equal, but not all of a prompt."""
    g = torch.Generator().manual_seed(seed + 555)
    counts = torch.randint(2, 6, (n,), generator=g)
    scores = [torch.randint(0, 2, (k,), generator=g).index_fill(0, torch.tensor([k - 1]), 3) for k in counts.tolist()]
    return torch.cat(scores).to(dtype), torch.arange(n).repeat_interleave(counts)


def random_ranked(n: int, seed: int, dtype: torch.dtype = torch.float64) -> RankedLogps:
    scores, prompt = random_order(n, seed, dtype)
    weight, target = random_weight(n, seed, dtype), random_logps(n, seed + 1, dtype)
    prompt_length = random_logps(n, seed + 2, dtype).length
    return RankedLogps(random_logps(len(scores), seed, dtype), scores, prompt, weight, prompt_length, target)


def random_rewards(n: int, seed: int, dtype: torch.dtype = torch.float64) -> RankedRewards:
    scores, prompt = random_order(n, seed, dtype)
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(scores), generator=g, dtype=dtype)
    margin = torch.rand(n, generator=g, dtype=dtype)
    return RankedRewards(rewards, scores, prompt, random_weight(n, seed, dtype), margin)


def random_rollout_logps(method: Method, n: int, seed: int, dtype: torch.dtype, config: Any) -> RolloutLogps:
    """`n` completions of a larger rollout, with the advantages that the method makes of it under these settings."""
    rollout = random_rollout(n // COMPLETIONS + 2, seed, dtype, beta=getattr(config, "pull", 0.0))
    return part(learnt(method, rollout, config, seed), slice(0, n))


def random_batch(method: Method, n: int, seed: int = 0, dtype: torch.dtype = torch.float64, config: Any = None) -> Any:
    """A batch of `n` examples (completions, of a rollout) with everything that any settings of the method may read.

    What is made of a rollout beforehand depends on the settings; `config` says which, if not the default ones.
    """
    if method.batch is Batch.ROLLOUT:
        return random_rollout_logps(method, n, seed, dtype, config or config_of(method))
    if method.batch is Batch.TOKENS:
        return TokensLogps(random_logps(n, seed, dtype), random_weight(n, seed, dtype))
    if method.batch is Batch.PAIRED:
        return random_paired(n, seed, dtype, reference=method.reference)
    if method.batch is Batch.RANKED:
        make = random_rewards if Needs.REWARDS in method.needs else random_ranked
        return make(n, seed, dtype)
    batch = random_unpaired(n, seed, dtype)
    if method.statistic is None:
        return batch
    return replace(batch, statistics=means(method.statistic(random_unpaired(n, seed + 50, dtype), config_of(method))))


def means(statistic: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the step hands in of a statistic's terms."""
    return {name: term.sum.sum() / term.weight.sum() for name, term in statistic.items()}


def part(batch: Any, rows: Rows) -> Any:
    """Some examples of a batch (completions, of a rollout), in the order of `rows`; statistics are of the whole."""
    if isinstance(batch, RolloutLogps):
        return _completions(batch, torch.arange(len(batch.weight))[rows])
    if not isinstance(batch, RankedLogps | RankedRewards):
        return map_logps(batch, lambda t: t[rows])
    picked = torch.arange(len(batch.weight))[rows].tolist()
    candidates = [(batch.prompt == b).nonzero().flatten() for b in picked]
    owner = torch.arange(len(picked)).repeat_interleave(torch.tensor([len(c) for c in candidates]))
    which = torch.cat(candidates)
    by_candidate = {"candidates", "rewards", "scores"}
    taken = {
        f.name: map_logps(getattr(batch, f.name), lambda t, f=f: t[which if f.name in by_candidate else rows])
        for f in fields(batch)
        if f.name != "prompt"
    }
    return type(batch)(prompt=owner, **taken)


def _completions(batch: RolloutLogps, picked: Tensor) -> RolloutLogps:
    which = torch.cat([(batch.owner == c).nonzero().flatten() for c in picked])
    of_completions = {"length", "weight"}
    taken = {
        f.name: map_logps(getattr(batch, f.name), lambda t, f=f: t[picked if f.name in of_completions else which])
        for f in fields(batch)
    }
    return RolloutLogps(**taken | {"owner": torch.arange(len(picked)).repeat_interleave(batch.length[picked])})


def floating(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `function` applied to numbers, not to indices."""
    return map_logps(batch, lambda t: function(t) if t.is_floating_point() else t)


def policy_leaves(batch: Any) -> list[Tensor]:
    """What the policy (or the scalar head, or both) said, made leaves."""
    if isinstance(batch, RolloutLogps):
        return [t.requires_grad_() for t in (batch.policy, batch.values) if t is not None]
    if isinstance(batch, RankedRewards):
        return [batch.rewards.requires_grad_()]
    names = {PairedLogps: ("chosen", "rejected"), RankedLogps: ("candidates",)}.get(type(batch), ("policy",))
    return [getattr(batch, name).total.requires_grad_() for name in names]


def wanted(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Gradients of what is to become likelier, and of what is to become less likely; after `policy_leaves`."""
    if isinstance(batch, TokensLogps):
        return batch.policy.total.grad, None
    if isinstance(batch, PairedLogps):
        return batch.chosen.total.grad, batch.rejected.total.grad
    if isinstance(batch, UnpairedLogps):
        return batch.policy.total.grad[batch.label == 1], batch.policy.total.grad[batch.label == 0]
    if isinstance(batch, RolloutLogps):
        return batch.policy.grad[batch.advantages > 0], batch.policy.grad[batch.advantages < 0]
    leaf = batch.rewards if isinstance(batch, RankedRewards) else batch.candidates.total
    same = batch.prompt[:, None] == batch.prompt[None, :]
    better = ((batch.scores[:, None] > batch.scores[None, :]) & same).any(0)
    worse = ((batch.scores[:, None] < batch.scores[None, :]) & same).any(0)
    return leaf.grad[~better], leaf.grad[~worse]


def reference_leaves(batch: Any) -> list[Tensor]:
    """What the reference said, made leaves; none without a reference. Of a rollout all that was fixed beforehand."""
    if isinstance(batch, RolloutLogps):
        frozen = (batch.reference, batch.old, batch.advantages, batch.old_values, batch.returns)
        return [t.requires_grad_() for t in frozen if t is not None]
    frozen = getattr(batch, "reference", None)
    if frozen is None:
        return []
    sides = [frozen] if isinstance(frozen, Logps) else [frozen.chosen, frozen.rejected]
    return [side.total.requires_grad_() for side in sides]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a batch."""
    if isinstance(value, Tensor):
        return [value]
    return [t for f in fields(value) for t in tensors(getattr(value, f.name))] if is_dataclass(value) else []
