"""Which tokens of a flat pack attend to which, laid out so that a kernel can run them in few calls.

A flat pack is one row without padding. Its *segments* are prompts, which attend to themselves, and completions, which
attend to themselves and to their prompt; a prompt stands in the row once for all its completions. A *bundle* is some
examples of like prompt length: first their prompts, then their completions, in *blocks* of like length. A block is what
one call of a kernel computes; it is padded inside attention only, every other layer sees real tokens alone.
Shape letters: n segments of a block, m real tokens of it, Q longest segment, P longest prompt, S segments of the pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

BLOCK_TOKENS = 4096
"""Padded tokens, prompts included, up to which segments share a block; a larger segment has one of its own."""
BLOCK_WASTE = 1.25
"""Most padded tokens per real token of a block."""


@dataclass(frozen=True)
class Block:
    """Segments that one kernel call computes; their tokens stand one after the other in the pack.

    Attributes:
        size: m.
        shape: (n, Q).
        padding: [n * Q] which of the m tokens stands where in the padded block; None if nothing is padded.
        real: [m] where the real tokens stand in the padded block; None if nothing is padded.
        prompt: [n] which prompt of the bundle each completion follows; None for prompts, and if there is one prompt.
        before: [n] length of each completion's prompt, [1] if there is one prompt; None where causal attention over the
            segment is all there is.
        longest: P.
    """

    size: int
    shape: tuple[int, int]
    padding: Tensor | None = None
    real: Tensor | None = None
    prompt: Tensor | None = None
    before: Tensor | None = None
    longest: int = 0

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[n or 1, 1, Q, P + Q] what is added to the attention scores: keys are prompt, then completion."""
        if self.before is None:
            return None
        width, device = self.shape[1], self.before.device
        known = torch.arange(self.longest, device=device) < self.before[:, None]
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        rows = len(self.before)
        seen = torch.cat([known[:, None].expand(rows, width, -1), causal.expand(rows, -1, -1)], dim=2)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[:, None]


@dataclass(frozen=True)
class Bundle:
    """A block of prompts, or None where completions carry theirs with them, and the blocks of their completions."""

    prompts: Block | None
    completions: tuple[Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All of them, in the order of the pack."""
        return self.completions if self.prompts is None else (self.prompts, *self.completions)


@dataclass(frozen=True)
class Segments:
    """All segments of a flat pack.

    Attributes:
        bundles: For kernels that take padded batches.
        query_ends: [S + 1] cumulative lengths of the segments, int32, for kernels that take ragged ones.
        key_ends: [S + 1] cumulative lengths of prompt + segment, int32.
        keys: Token of the pack of every key, segment after segment, its prompt first.
        longest: Longest segment, and longest prompt + segment.
    """

    bundles: tuple[Bundle, ...]
    query_ends: Tensor
    key_ends: Tensor
    keys: Tensor
    longest: tuple[int, int]
    _biases: dict[tuple[int, torch.dtype], Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def bias(self, block: Block, dtype: torch.dtype) -> Tensor | None:
        """`block.bias`, made once for all layers while the pack is computed."""
        key = (id(block), dtype)
        if key not in self._biases:
            self._biases[key] = block.bias(dtype)
        return self._biases[key]

    @property
    def sizes(self) -> list[int]:
        """Tokens of every block, in the order of the pack."""
        return [block.size for bundle in self.bundles for block in bundle.blocks]

    def to(self, device: torch.device) -> Segments:
        """The same on another device."""
        bundles = tuple(
            Bundle(b.prompts and _moved(b.prompts, device), tuple(_moved(c, device) for c in b.completions))
            for b in self.bundles
        )
        return replace(_moved(self, device), bundles=bundles, _biases={})


@dataclass(frozen=True)
class Placed:
    """A completion and where it stands: `start` is its first token in the pack, `prompt_start` that of its prompt."""

    example: int
    completion: int
    start: int
    prompt_start: int


class Layout:
    """Lays examples out in one row, bundle after bundle.

    Args:
        prompts: Prompt length of each example; zeros where completions carry their prompt with them.
        completions: Lengths of the completions of each example.

    Attributes:
        placed: The completions in the order of the row.
        prompt_starts: First token of each example's prompt.
        length: Tokens of the row.
        segments: What attention needs.
    """

    def __init__(self, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> None:
        self.prompts, self.completions = prompts, completions
        self.placed: list[Placed] = []
        self.prompt_starts = [0] * len(prompts)
        self.length = 0
        self._spans: list[tuple[int, int, int, int]] = []
        bundles = tuple(self._bundle(members) for members in self._bundles())
        self.segments = Segments(bundles, *self._ragged())

    def _bundles(self) -> Iterator[list[int]]:
        order = sorted(range(len(self.prompts)), key=lambda e: (-self.prompts[e], e))
        yield from batches(order, lambda e: self.prompts[e], lambda e: self.prompts[e] + sum(self.completions[e]))

    def _bundle(self, members: list[int]) -> Bundle:
        lengths = [self.prompts[e] for e in members]
        shared = max(lengths) > 0
        for e, length in zip(members, lengths, strict=True):
            self.prompt_starts[e] = self.length
            if length:
                self._spans.append((self.length, length, 0, 0))
            self.length += length
        own = [(i, e, k) for i, e in enumerate(members) for k in range(len(self.completions[e]))]
        own.sort(key=lambda each: -self.completions[each[1]][each[2]])
        length_of = lambda each: self.completions[each[1]][each[2]]  # noqa: E731
        blocks = []
        for group in batches(own, length_of, lambda each: length_of(each) + lengths[each[0]]):
            blocks.append(_block([length_of(each) for each in group], [each[0] for each in group], lengths))
            for _, e, k in group:
                self.placed.append(Placed(e, k, self.length, self.prompt_starts[e]))
                self._spans.append((self.length, self.completions[e][k], self.prompt_starts[e], self.prompts[e]))
                self.length += self.completions[e][k]
        return Bundle(_block(lengths) if shared else None, tuple(blocks))

    def _ragged(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        own, before = (torch.tensor([span[i] for span in self._spans]) for i in (1, 3))
        keys = [
            torch.arange(at, at + n)
            for start, length, prompt, p in self._spans
            for at, n in ((prompt, p), (start, length))
        ]
        return _ends(own), _ends(own + before), torch.cat(keys), (int(own.max()), int((own + before).max()))


def batches(order: Sequence[Any], width: Any, size: Any) -> Iterator[list[Any]]:
    """Cut items, sorted by falling `width`, into batches that are small and waste little when padded to their first.

    Args:
        order: The items.
        width: Item -> what it is padded in.
        size: Item -> its tokens, what stands beside it included.
    """
    batch: list[Any] = []
    real = padded = tokens = 0
    for item in order:
        padded, real, tokens = padded + width(batch[0] if batch else item), real + width(item), tokens + size(item)
        if batch and (tokens > BLOCK_TOKENS or padded > BLOCK_WASTE * real):
            yield batch
            batch, padded, real, tokens = [], width(item), width(item), size(item)
        batch.append(item)
    if batch:
        yield batch


def _block(lengths: Sequence[int], prompt: Sequence[int] | None = None, prompts: Sequence[int] = ()) -> Block:
    """A block of segments of these lengths; of completions, with the prompt of each and the lengths of the prompts."""
    n, width = len(lengths), max(lengths)
    size, steps = torch.tensor(lengths), torch.arange(width)
    padding = real = None
    if min(lengths) < width:
        inside = steps < size[:, None]
        starts = size.cumsum(0) - size
        padding = torch.where(inside, starts[:, None] + steps, starts[:, None]).flatten().clamp(max=sum(lengths) - 1)
        real = inside.flatten().nonzero()[:, 0]
    block = Block(sum(lengths), (n, width), padding, real)
    if prompt is None or max(prompts) == 0:
        return block
    owner = torch.tensor(prompt)
    before = torch.tensor(prompts)
    if len(prompts) == 1:
        return replace(block, before=before, longest=prompts[0])
    return replace(block, prompt=owner, before=before[owner], longest=max(prompts))


def _ends(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)


def _moved(value: Any, device: torch.device) -> Any:
    tensors = {f.name: t for f in fields(value) if isinstance(t := getattr(value, f.name), Tensor)}
    return replace(value, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
