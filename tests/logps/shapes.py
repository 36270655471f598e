"""Examples of awkward shapes, and what an engine makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align.data.chat import Completion, Example
from align.logps import Packing, pack_examples, token_logps

SHAPES = {
    "pairs": [(9, (5, 7)), (6, (4, 4)), (3, (8, 2))],
    "no prompt": [(0, (4, 3)), (0, (5, 5)), (7, (2, 6))],
    "one completion": [(8, (5,)), (3, (9,)), (4, (1,))],
    "unequal k": [(5, (3, 4, 6)), (2, (7,)), (10, (1, 2)), (4, (2, 2, 2, 5))],
    "one token": [(1, (1, 1)), (5, (1, 3)), (12, (1, 1, 1))],
    "long prompts": [(60, (3, 4)), (2, (3, 40)), (58, (5, 1))],
}


def examples_of(shape: list[tuple[int, tuple[int, ...]]], vocabulary: int = 300) -> list[Example]:
    """Random ids; the first completion of each example is truncated and its middle token is not trained."""
    g = torch.Generator().manual_seed(len(shape))
    ids = lambda n: torch.randint(4, vocabulary, (n,), generator=g).tolist()  # noqa: E731
    examples = []
    for row, (prompt, lengths) in enumerate(shape):
        completions = []
        for k, n in enumerate(lengths):
            mask = [True] * n
            if k == 0 and n > 2:
                mask[1] = False
            completions.append(Completion(ids(n), mask, truncated=k == 0))
        examples.append(Example(row, ids(prompt), tuple(completions), 1.0))
    return examples


def scored(
    model: Any, role: str, examples: list[Example], packing: Packing, budget: int = 10_000, score_prompts: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Totals of the completions of each example, and of its prompt, with gradient."""
    totals: list[Tensor] = [torch.empty(0)] * len(examples)
    prompts: list[Tensor] = [torch.empty(0)] * len(examples)
    for pack in pack_examples(examples, budget, packing=packing, score_prompts=score_prompts):
        values = model(role, token_logps, pack)
        own, of_prompts = pack.sum_by_completion(values).total, pack.sum_by_prompt(values).total
        start = 0
        for b, i in enumerate(pack.examples):
            k = len(examples[i].completions)
            totals[i], prompts[i] = own[start : start + k], of_prompts[b]
            start += k
    return totals, prompts


def gradient(model: Any, totals: list[Tensor]) -> Tensor:
    """Of a sum that weighs every completion otherwise, over all trained parameters."""
    model.zero_grad()
    loss = torch.stack([((k + 1.5) * t).sum() for totals_of in totals for k, t in enumerate(totals_of.unbind())]).sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
