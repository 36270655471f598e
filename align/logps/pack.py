"""Packs: the examples of one forward pass, cut by token budget.

A pack lists, for every trained token, which hidden state predicts it and which completion it belongs to. Nothing after
this file knows how completions were laid out in rows. Shape letters: R rows, T padded row length, C completions, N
trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Completion, Example
from align.types import Logps

PAD_ID = 0
"""Any id will do: rows are padded on the right, so causal attention never lets a real token see the padding."""


@dataclass(frozen=True)
class Pack:
    """One forward pass.

    Attributes:
        input_ids: [R, T] token ids, padded on the right.
        positions: [N] index into the flattened [R * T] hidden states of the state that predicts each trained token.
        targets: [N] the trained tokens.
        owner: [N] the completion each trained token belongs to, counted over the pack; scored tokens of prompts come
            after all completions, C + b for the prompt of the b-th example.
        last: [C] index of the state of each completion's last token.
        completions: C, how many completions the pack holds.
        examples: Which of the given examples are in the pack, in order.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    last: Tensor
    completions: int
    examples: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Positions computed by the forward pass, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Pack:
        """The same pack on another device."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)

    def sum_by_completion(self, values: Tensor) -> Logps:
        """Sum [N] log-probabilities of trained tokens to [C] totals and lengths, in fp32."""
        return self._sums(values, slice(0, self.completions))

    def sum_by_prompt(self, values: Tensor) -> Logps:
        """The same of the prompts' own tokens, [B]."""
        return self._sums(values, slice(self.completions, self.completions + len(self.examples)))

    def _sums(self, values: Tensor, owners: slice) -> Logps:
        zeros = torch.zeros(self.completions + len(self.examples), dtype=torch.float32, device=values.device)
        total = zeros.index_add(0, self.owner, values.float())
        length = zeros.index_add(0, self.owner, torch.ones_like(values, dtype=torch.float32))
        return Logps(total[owners], length[owners])


def pack_examples(examples: Sequence[Example], pack_tokens: int, *, score_prompts: bool = False) -> list[Pack]:
    """Cut examples into packs of at most `pack_tokens` padded tokens, longest first.

    All completions of an example stay in one pack, because a loss may need them together. An example that is larger
    than the budget gets a pack of its own. The result depends on the examples alone, never on their order in time.
    """
    size = [max(_row_length(e, c) for c in e.completions) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-size[i], i))
    packs: list[Pack] = []
    group: list[int] = []
    rows = width = 0
    for i in order:
        k = len(examples[i].completions)
        if group and (rows + k) * width > pack_tokens:
            packs.append(_lay_out(examples, group, score_prompts))
            group, rows = [], 0
        if not group:
            width = size[i]
        group.append(i)
        rows += k
    if group:
        packs.append(_lay_out(examples, group, score_prompts))
    return packs


def empty_pack(completions: int) -> Pack:
    """A pack without a trained token: it adds nothing and keeps ranks in step (ZeRO-3 needs equal forward counts)."""
    none = torch.zeros(0, dtype=torch.long)
    return Pack(torch.full((1, 2), PAD_ID), none, none, none, none, completions, ())


def _row_length(example: Example, completion: Completion) -> int:
    return len(example.prompt_ids) + len(completion.ids)


def _lay_out(examples: Sequence[Example], group: list[int], score_prompts: bool) -> Pack:
    rows = [(examples[i], c) for i in group for c in examples[i].completions]
    width = max(_row_length(e, c) for e, c in rows)
    input_ids = torch.full((len(rows), width), PAD_ID)
    positions: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    for r, (example, completion) in enumerate(rows):
        ids = example.prompt_ids + completion.ids
        input_ids[r, : len(ids)] = torch.tensor(ids)
        start = len(example.prompt_ids)
        trained = [t for t, on in enumerate(completion.mask) if on]
        positions.extend(r * width + start + t - 1 for t in trained)
        targets.extend(completion.ids[t] for t in trained)
        owner.extend([r] * len(trained))
        last.append(r * width + len(ids) - 1)
    row = 0
    for b, i in enumerate(group if score_prompts else ()):
        prompt = examples[i].prompt_ids
        positions.extend(range(row * width, row * width + len(prompt) - 1))
        targets.extend(prompt[1:])
        owner.extend([len(rows) + b] * (len(prompt) - 1))
        row += len(examples[i].completions)
    as_long = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return Pack(input_ids, as_long(positions), as_long(targets), as_long(owner), as_long(last), len(rows), tuple(group))
