"""Rollouts for the methods on them: random ones, and those of the vectors, which are padded to [B, T] with a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from align.methods import Method
from align.types import Advantages, Needs, Rollout, RolloutLogps

COMPLETIONS = 3
"""Of each prompt of a random rollout."""


def ragged(rows: Any, mask: Any) -> Tensor:
    """[N] the values of padded rows that are inside the mask, completion after completion."""
    return torch.tensor(rows, dtype=torch.float64)[torch.tensor(mask).bool()]


def padded(values: Tensor, length: Tensor) -> Tensor:
    """[C, T] the rows of [N] values, with zeros behind them."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(length.tolist())), batch_first=True)


def rollout_of(inputs: dict[str, Any], **changes: Any) -> Rollout:
    """A vector's rollout, of one prompt and without dropped completions."""
    mask = inputs["mask"]
    tokens = {"logps": ("old_logps", "logps"), "reference": ("ref_logps",), "values": ("values",)}
    given = {name: ragged(inputs[key], mask) for name, keys in tokens.items() for key in keys if key in inputs}
    scores = inputs.get("scores", inputs.get("rewards", [0.0] * len(mask)))
    whole = Rollout(
        scores=torch.tensor(scores, dtype=torch.float64),
        prompt=torch.zeros(len(mask), dtype=torch.long),
        length=torch.tensor(mask).sum(1),
        kept=torch.ones(len(mask), dtype=torch.bool),
        beta=inputs.get("kl_coef", 0.0),
    )
    return replace(whole, **given | changes)


def batch_of(inputs: dict[str, Any], advantages: Tensor, **changes: Any) -> RolloutLogps:
    """A vector's batch: its tokens with these advantages [N]."""
    mask = inputs["mask"]
    length = torch.tensor(mask).sum(1)
    batch = RolloutLogps(
        policy=ragged(inputs["new_logps"], mask),
        old=ragged(inputs["old_logps"], mask),
        advantages=advantages,
        owner=torch.arange(len(mask)).repeat_interleave(length),
        length=length,
        weight=torch.ones(len(mask), dtype=torch.float64),
        reference=ragged(inputs["ref_logps"], mask) if "ref_logps" in inputs else None,
    )
    return replace(batch, **changes)


def random_rollout(prompts: int, seed: int = 0, dtype: torch.dtype = torch.float64, *, beta: float = 0.1) -> Rollout:
    """Completions of unequal length, some of them dropped, with a reference and a critic."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    count = prompts * COMPLETIONS
    length = torch.randint(1, 8, (count,), generator=g)
    tokens = int(length.sum())
    logps = -draw(tokens).abs() - 0.1
    return Rollout(
        scores=draw(count) * 2 + 0.5,
        prompt=torch.arange(prompts).repeat_interleave(COMPLETIONS),
        length=length,
        kept=torch.arange(count).remainder(5) != 3,
        logps=logps,
        reference=logps + draw(tokens) * 0.3,
        values=draw(tokens) * 0.5,
        beta=beta,
    )


def of_prompts(rollout: Rollout, prompts: list[int]) -> Rollout:
    """The completions of some prompts, in that order."""
    picked = torch.cat([(rollout.prompt == p).nonzero().flatten() for p in prompts])
    which = torch.cat([(rollout.owner == c).nonzero().flatten() for c in picked])
    per_token = {name: getattr(rollout, name)[which] for name in ("logps", "reference", "values")}
    per_completion = {name: getattr(rollout, name)[picked] for name in ("scores", "length", "kept")}
    order = torch.arange(len(prompts)).repeat_interleave(torch.bincount(rollout.prompt)[prompts])
    return replace(rollout, prompt=order, **per_token, **per_completion)


def learnt(method: Method, rollout: Rollout, config: Any, seed: int = 0) -> RolloutLogps:
    """A batch of a whole rollout, when policy and critic have moved since; what is dropped has weight 0."""
    found: Advantages = method.advantages(rollout, config)
    g, dtype = torch.Generator().manual_seed(seed + 77), rollout.scores.dtype
    draw = lambda: torch.randn(len(rollout.owner), generator=g, dtype=dtype)  # noqa: E731
    policy, values, entropy = rollout.logps + draw() * 0.2, rollout.values + draw() * 0.4, draw().abs()
    weight = (torch.rand(len(rollout.length), generator=g, dtype=dtype) + 0.5) * rollout.kept
    batch = {"owner": rollout.owner, "length": rollout.length, "weight": weight, "entropy": entropy}
    if getattr(config, "reference", None) is not None:
        batch["reference"] = rollout.reference
    if Needs.VALUES in method.needs:
        batch |= {"values": values, "old_values": rollout.values, "returns": found.returns}
    return RolloutLogps(policy, rollout.logps, found.advantages, **batch)
