"""Packs: the examples of one forward pass, cut by token budget and laid out in rows.

A pack lists, for every trained token, which hidden state predicts it and which completion it belongs to. Nothing after
this file knows how completions were laid out. Shape letters: R rows, T row length, C completions, N trained tokens.

- ``rows``: one row per completion with its prompt, padded on the right. Any model can compute it.
- ``flat``: the same sequences one after the other in a single row, without padding.
- ``shared``: flat, with the prompt of an example once for all its completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from torch import Tensor

from align.data.chat import Completion, Example
from align.logps.segments import Layout, Segments
from align.recipe.packing import Packing
from align.types import Logps

PAD_ID = 0
"""Any id will do: rows are padded on the right, so causal attention never lets a real token see the padding."""


@dataclass(frozen=True)
class Pack:
    """One forward pass.

    Attributes:
        input_ids: [R, T] token ids, padded on the right; [1, T] where the pack is flat.
        positions: [N] index into the flattened [R * T] hidden states of the state that predicts each trained token;
            those of a completion are neighbours, in order.
        targets: [N] the trained tokens.
        owner: [N] the completion each trained token belongs to, counted over the pack; scored tokens of prompts come
            after all completions, C + b for the prompt of the b-th example.
        last: [C] index of the state of each completion's last token.
        completions: C, how many completions the pack holds.
        examples: Which of the given examples are in the pack, in order.
        position_ids: [1, T] position of each token in its own sequence; None for padded rows, where it is the column.
        segments: What attends to what in a flat pack; None for padded rows.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    last: Tensor
    completions: int
    examples: tuple[int, ...]
    position_ids: Tensor | None = None
    segments: Segments | None = None

    @property
    def tokens(self) -> int:
        """Positions computed by the forward pass, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Pack:
        """The same pack on another device."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved, segments=self.segments and self.segments.to(device))

    def sum_by_completion(self, values: Tensor) -> Logps:
        """Sum [N] log-probabilities of trained tokens to [C] totals and lengths, in fp32."""
        return self._sums(values, slice(0, self.completions))

    def sum_by_prompt(self, values: Tensor) -> Logps:
        """The same of the prompts' own tokens, [B]."""
        return self._sums(values, slice(self.completions, self.completions + len(self.examples)))

    def _sums(self, values: Tensor, owners: slice) -> Logps:
        # index_add adds one token after the other: over a thousand of them, fp32 drifts by more than a forward pass.
        zeros = torch.zeros(self.completions + len(self.examples), dtype=torch.float64, device=values.device)
        total = zeros.index_add(0, self.owner, values.double()).float()
        length = zeros.index_add(0, self.owner, torch.ones_like(values, dtype=torch.float64)).float()
        return Logps(total[owners], length[owners])


class Packs(Sequence[Pack]):
    """The packs of some examples. Which example is in which is known at once; a pack is laid out when it is taken."""

    def __init__(self, groups: Sequence[list[int]], lay_out: Callable[[list[int]], Pack]) -> None:
        self.groups, self._lay_out = groups, lay_out

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> Packs: ...
    def __getitem__(self, index: int | slice) -> Pack | Packs:
        if isinstance(index, slice):
            return Packs(self.groups[index], self._lay_out)
        return self._lay_out(self.groups[index])


def pack_examples(
    examples: Sequence[Example], pack_tokens: int, *, packing: Packing = "rows", score_prompts: bool = False
) -> Packs:
    """Cut examples into packs of at most `pack_tokens` computed tokens, longest first.

    All completions of an example stay in one pack, because a loss may need them together. An example that is larger
    than the budget gets a pack of its own. The result depends on the examples alone, never on their order in time.

    Args:
        examples: Any number, of any shape.
        pack_tokens: Token budget of a forward pass, padding included.
        packing: How sequences are laid out.
        score_prompts: Whether the prompts' own tokens are scored as well.
    """
    longest = [max(_row_length(e, c) for c in e.completions) for e in examples]
    tokens = [_tokens(e, packing) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-longest[i], i))
    groups: list[list[int]] = []
    group: list[int] = []
    rows = width = used = 0
    for i in order:
        k = len(examples[i].completions)
        size = (rows + k) * width if packing == "rows" else used + tokens[i]
        if group and size > pack_tokens:
            groups.append(group)
            group, rows, used = [], 0, 0
        if not group:
            width = longest[i]
        group.append(i)
        rows, used = rows + k, used + tokens[i]
    if group:
        groups.append(group)
    lay_out = _padded if packing == "rows" else _flat
    return Packs(groups, lambda group: lay_out(examples, group, score_prompts, packing))


def empty_pack(completions: int) -> Pack:
    """A pack without a trained token: it adds nothing and keeps ranks in step (ZeRO-3 needs equal forward counts)."""
    none = torch.zeros(0, dtype=torch.long)
    return Pack(torch.full((1, 2), PAD_ID), none, none, none, none, completions, ())


def _row_length(example: Example, completion: Completion) -> int:
    return len(example.prompt_ids) + len(completion.ids)


def _shares(example: Example, packing: Packing) -> bool:
    """Whether the prompt stands apart from the completions; with one completion nothing would be gained."""
    return packing == "shared" and len(example.completions) > 1


def _tokens(example: Example, packing: Packing) -> int:
    k = 1 if _shares(example, packing) else len(example.completions)
    return k * len(example.prompt_ids) + sum(len(c.ids) for c in example.completions)


class _Scored:
    """Collects the trained tokens of a pack, completion after completion."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.targets: list[int] = []
        self.owner: list[int] = []
        self.last: list[int] = []

    def completion(self, completion: Completion, start: int, before: int) -> None:
        """A completion whose first token stands at `start` and is predicted by the state at `before` (-1: by none)."""
        trained = [t for t, on in enumerate(completion.mask) if on and (t or before >= 0)]
        self.positions.extend(start + t - 1 if t else before for t in trained)
        self.targets.extend(completion.ids[t] for t in trained)
        self.owner.extend([len(self.last)] * len(trained))
        self.last.append(start + len(completion.ids) - 1)

    def prompt(self, ids: Sequence[int], start: int, owner: int) -> None:
        """A prompt's own tokens but its first."""
        self.positions.extend(range(start, start + len(ids) - 1))
        self.targets.extend(ids[1:])
        self.owner.extend([owner] * (len(ids) - 1))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`positions`, `targets`, `owner`, `last`."""
        positions, targets = (
            torch.tensor(self.positions, dtype=torch.long),
            torch.tensor(self.targets, dtype=torch.long),
        )
        return positions, targets, torch.tensor(self.owner, dtype=torch.long), torch.tensor(self.last, dtype=torch.long)


def _padded(examples: Sequence[Example], group: list[int], score_prompts: bool, packing: Packing) -> Pack:
    rows = [(examples[i], c) for i in group for c in examples[i].completions]
    width = max(_row_length(e, c) for e, c in rows)
    input_ids = torch.full((len(rows), width), PAD_ID)
    scored = _Scored()
    for r, (example, completion) in enumerate(rows):
        ids = example.prompt_ids + completion.ids
        input_ids[r, : len(ids)] = torch.tensor(ids)
        start = r * width + len(example.prompt_ids)
        scored.completion(completion, start, start - 1 if example.prompt_ids else -1)
    row = 0
    for b, i in enumerate(group if score_prompts else ()):
        scored.prompt(examples[i].prompt_ids, row * width, len(rows) + b)
        row += len(examples[i].completions)
    return Pack(input_ids, *scored.tensors(), len(rows), tuple(group))


def _flat(examples: Sequence[Example], group: list[int], score_prompts: bool, packing: Packing) -> Pack:
    own = [examples[i] for i in group]
    apart = [_shares(e, packing) for e in own]
    lead = [0 if shares else len(e.prompt_ids) for e, shares in zip(own, apart, strict=True)]
    layout = Layout(
        [len(e.prompt_ids) - carried for e, carried in zip(own, lead, strict=True)],
        [[carried + len(c.ids) for c in e.completions] for e, carried in zip(own, lead, strict=True)],
    )
    ids, places = torch.empty(layout.length, dtype=torch.long), torch.empty(layout.length, dtype=torch.long)

    def write(at: int, tokens: list[int], first: int) -> None:
        ids[at : at + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        places[at : at + len(tokens)] = torch.arange(first, first + len(tokens))

    starts = {(placed.example, placed.completion): placed.start for placed in layout.placed}
    scored, prompt_starts = _Scored(), []
    for b, example in enumerate(own):
        prompt, at = example.prompt_ids, layout.prompt_starts[b]
        if apart[b]:
            write(at, prompt, 0)
        for k, completion in enumerate(example.completions):
            start = starts[b, k]
            if apart[b]:
                write(start, completion.ids, len(prompt))
                scored.completion(completion, start, at + len(prompt) - 1 if prompt else -1)
            else:
                write(start, prompt + completion.ids, 0)
                start += len(prompt)
                scored.completion(completion, start, start - 1 if prompt else -1)
        prompt_starts.append(at if apart[b] else starts[b, 0])
    if score_prompts:
        for b, example in enumerate(own):
            scored.prompt(example.prompt_ids, prompt_starts[b], len(scored.last) + b)
    completions = len(scored.last)
    return Pack(ids[None], *scored.tensors(), completions, tuple(group), places[None], layout.segments)
