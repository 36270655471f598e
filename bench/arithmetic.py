"""The arithmetic of a training step with LoRA on a frozen base: how many floating-point operations each arm has to do.

Matrix products alone are counted, two operations per multiply-add; norms, softmax and rotary embeddings are left out.
Shape letters: N frozen parameters of the layers, h hidden, V vocabulary, P prompt, R response, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Way = Literal["shared", "flat", "rows"]
HEAD_COST = {"once": 4, "recomputed": 6, "trained": 8, "none": 0}
"""Operations per h V and scored position: logits (2) and their gradient (2), once more logits in the backward pass (2),
and the gradient of the head's own weight (2)."""


@dataclass(frozen=True)
class Sizes:
    """What a decoder's cost depends on.

    Attributes:
        hidden: h.
        intermediate: Width of the gated feed-forward part.
        layers: How many.
        queries: Query heads times head size.
        keys: Key-value heads times head size.
        vocabulary: V.
        rank: Rank of the adapter on every linear layer.
    """

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    rank: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every linear layer of one decoder layer."""
        h, m, q, k = self.hidden, self.intermediate, self.queries, self.keys
        return ((h, q), (h, k), (h, k), (q, h), (h, m), (h, m), (m, h))

    @property
    def body(self) -> int:
        """N: frozen parameters that multiply every token."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def adapter(self) -> int:
        """Parameters of the adapter."""
        return self.layers * self.rank * sum(i + o for i, o in self.linears)


@dataclass(frozen=True)
class Layout:
    """What one step computes.

    Attributes:
        tokens: Positions that pass through the layers, padding included.
        pairs: (query, key) pairs that causal attention needs, padding included.
        scored: Positions that pass through the head.
        heads: Positions that a reward is read at, one per response.
    """

    tokens: int
    pairs: int
    scored: int
    heads: int = 0


@dataclass(frozen=True)
class Flops:
    """Operations of one step, by where they happen."""

    body: float
    adapter: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.body + self.adapter + self.attention + self.head


def lengths(examples: Iterable[Any]) -> list[tuple[int, tuple[int, ...]]]:
    """(P, (R, ...)) of each example."""
    return [(len(e.prompt_ids), tuple(len(c.ids) for c in e.completions)) for e in examples]


def effective_tokens(shapes: Iterable[tuple[int, Sequence[int]]]) -> int:
    """Real prompt and response tokens of every response: the same number whatever an arm shares or pads.

    Example:
        >>> effective_tokens([(512, (128, 128))])
        1280
    """
    return sum(p + r for p, responses in shapes for r in responses)


def layout(groups: Sequence[Sequence[tuple[int, Sequence[int]]]], way: Way, *, everywhere: bool = False) -> Layout:
    """What has to be computed for some groups of examples, one group per forward pass.

    Args:
        groups: (P, (R, ...)) of each example of each group.
        way: A prompt once for all its responses, every response with its prompt, or the latter padded to the longest
            of its group.
        everywhere: The head scores every position and not only those that predict a response's token.

    Example:
        >>> layout([[(4, (2, 2))]], "shared")
        Layout(tokens=8, pairs=32, scored=4, heads=2)
    """
    tokens = pairs = scored = heads = 0
    for group in groups:
        longest = max(p + max(responses) for p, responses in group)
        for p, responses in group:
            heads += len(responses)
            scored += sum(responses)
            if way == "shared":
                tokens += p + sum(responses)
                pairs += _triangle(p) + sum(r * p + _triangle(r) for r in responses)
                continue
            for r in responses:
                t = p + r if way == "flat" else longest
                tokens, pairs = tokens + t, pairs + _triangle(t)
    if everywhere:  # a shared prompt's last state predicts the first token of every response
        scored = tokens + (heads - sum(map(len, groups)) if way == "shared" else 0)
    return Layout(tokens, pairs, scored, heads)


def forward_flops(sizes: Sizes, layout: Layout, *, adapter: bool = True, reward: bool = False) -> Flops:
    """Operations of a pass without gradient: 2 N per token, 4 per query, key and channel, 2 h V per scored position."""
    return Flops(
        body=2.0 * sizes.body * layout.tokens,
        adapter=2.0 * sizes.adapter * layout.tokens if adapter else 0.0,
        attention=4.0 * sizes.queries * sizes.layers * layout.pairs,
        head=2.0 * sizes.hidden * (layout.heads if reward else sizes.vocabulary * layout.scored),
    )


def step_flops(
    sizes: Sizes,
    layout: Layout,
    *,
    head: Literal["once", "recomputed", "trained", "none"] = "once",
    checkpointing: bool = False,
    live_reference: bool = False,
    input_gradients: bool = False,
) -> Flops:
    """Operations of a forward and a backward pass.

    A frozen weight costs 2 in the forward pass and 2 for the gradient of its input; an adapter 2 more for its own
    gradient. The first three linear layers need no gradient of their input. Attention is two products in the forward
    pass and five in the backward pass, as kernels that keep no scores compute them again.

    Args:
        sizes: Of the model.
        layout: What the step computes.
        head: How the head is computed; `none` for a reward model, whose scalar head is trained.
        checkpointing: Every layer is computed again in the backward pass.
        live_reference: The reference's pass, with adapters off, belongs to the step.
        input_gradients: The gradients of the embeddings are computed though these are frozen, as transformers has it
            where layers are checkpointed.
    """
    once = forward_flops(sizes, layout, reward=head == "none")
    head_cost = HEAD_COST[head] * float(sizes.hidden) * sizes.vocabulary * layout.scored
    unneeded = 0 if input_gradients else 2.0 * layout.tokens
    first = sum(i * o for i, o in sizes.linears[:3]), sizes.rank * sum(i for i, _ in sizes.linears[:3])
    total = Flops(
        body=2 * once.body - unneeded * first[0],
        adapter=3 * once.adapter - unneeded * first[1],
        attention=3.5 * once.attention,
        head=3 * once.head if head == "none" else head_cost,
    )
    if checkpointing:
        total = _sum(total, replace(once, head=0.0))
    return _sum(total, forward_flops(sizes, layout, adapter=False)) if live_reference else total


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _sum(a: Flops, b: Flops) -> Flops:
    return Flops(a.body + b.body, a.adapter + b.adapter, a.attention + b.attention, a.head + b.head)
