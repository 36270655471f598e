"""Keys and values of a rollout: those of a prompt once for all its completions, those of every row beside them.

A row attends to the two parts separately; their results are joined by the sums of exponentials, so the keys of a prompt
are read once a step however many rows complete it. Where each prompt has one row, both are one part. Everything is
allocated once and written in place. Shape letters: B rows, S slots for prompts, M rows of one prompt at most, P tokens
of a prompt, R own tokens of a row, G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.logps.precision import computed_in

NAME = "align-rollout"
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some models hand to their attention function that this one does not know."""
NEVER = -1e30
"""Added to the score of a key that a row does not see. Finite, so that a prompt without keys weighs nothing."""


class KV(Cache):
    """The cache of one rollout; `prefill`, `decode` or `nothing` says what the next forward pass does with it.

    Args:
        rows: B.
        row_tokens: R; with the prompt's, where prompts have no slots.
        slots: S; 0 where each prompt has one row, whose own tokens follow it.
        slot_tokens: P.
        device: Where it lies.
    """

    def __init__(self, rows: int, row_tokens: int, slots: int, slot_tokens: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.sizes = {"prompt": (slots, slot_tokens), "own": (rows, row_tokens)}
        self.device = device
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> keys and values [S, heads, P, D] of prompts."""
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> keys and values [B, heads, R, D] of rows."""
        self.nothing()

    # What the next pass is -------------------------------------------------------------------------------------------

    def nothing(self) -> None:
        """Keep no keys: a pass that only keeps other ranks company."""
        self.into: tuple[str, Tensor] | None = None
        self.at: Tensor | None = None

    def prefill(self, places: Tensor) -> None:
        """Keep the keys of prompts, which begin at the first token, in some slots [n], or rows where there are none."""
        self.into, self.at = ("prompt" if self.sizes["prompt"][0] else "own", places), None

    def decode(self, at: Tensor, width: int, prompts: Prompts | None = None) -> None:
        """Append one token to every row.

        Args:
            at: [B] how many tokens each row has.
            width: Tokens of a row to look at, this one included.
            prompts: What is kept of prompts; None where they are the beginning of rows.
        """
        self.into, self.at, self.width, self.prompts = None, at, width, prompts
        self.flat: dict[int, Tensor] = {}
        self.bias = _bias(at + 1, width)
        if prompts is not None:
            self.prompt_bias = _bias(prompts.lengths, prompts.width)

    # What a layer does -----------------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [n, heads, tokens, D]; they are returned as they came."""
        new = (key_states, value_states)
        heads, tokens = key_states.shape[1:3]
        if self.into is not None:
            part, places = self.into
            for kept, states in zip(self._kept(part, layer_idx, *new), new, strict=True):
                kept[:, :, :tokens].index_copy_(0, places, states.to(kept.dtype))
        elif self.at is not None:
            if heads not in self.flat:
                first = torch.arange(len(self.at) * heads, device=self.device) * self.sizes["own"][1]
                self.flat[heads] = (first.view(-1, heads) + self.at[:, None]).flatten()
            for kept, states in zip(self._kept("own", layer_idx, *new), new, strict=True):
                kept.view(-1, kept.shape[-1]).index_copy_(0, self.flat[heads], states.flatten(0, 2).to(kept.dtype))
        return new

    def attend(self, layer: int, query: Tensor, scaling: float | None) -> Tensor:
        """[B, 1, heads, D] attention of one query [B, heads, 1, D] per row to its prompt and its own tokens."""
        keys, values = (x[:, :, : self.width] for x in self.own[layer])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = (query * scale).to(keys.dtype).reshape(len(query), keys.shape[1], -1, query.shape[-1])
        scores = (query @ keys.transpose(2, 3)).float().add_(self.bias)
        weights = scores.softmax(-1)
        out = weights.to(values.dtype) @ values
        if self.prompts is not None and self.prompts.width:
            before, size_before = self._attend_prompts(layer, query)
            # The two parts share one normaliser: each counts as much as its exponentials weigh. By softmax: on a CPU a
            # sigmoid rounds otherwise where the last numbers of a tensor do not fill a vector.
            share = torch.cat([_size(scores, weights), size_before], -1).softmax(-1)[..., 1:]
            out = out.lerp(before.to(out.dtype), share.to(out.dtype))
        return out.flatten(1, 2)[:, None]

    def _attend_prompts(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """[B, heads, G, D] attention to prompts alone and [B, heads, G, 1] the size of its normaliser, for each row."""
        assert self.prompts is not None
        keys, values = (x[: len(self.prompts.lengths), :, : self.prompts.width] for x in self.prompt[layer])
        members = self.prompts.members
        gathered = query.flatten(1).index_select(0, members.flatten()).view(*members.shape, *query.shape[1:])
        scores = (gathered.transpose(1, 2).flatten(2, 3) @ keys.transpose(2, 3)).float().add_(self.prompt_bias)
        weights = scores.softmax(-1)
        both = torch.cat([(weights.to(values.dtype) @ values).float(), _size(scores, weights)], -1)
        apart = both.unflatten(2, (members.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        out, size = apart.index_select(0, self.prompts.place).split([values.shape[-1], 1], -1)
        return out, size

    # Storage ---------------------------------------------------------------------------------------------------------

    def _kept(self, part: str, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        store = getattr(self, part)
        if layer not in store:
            n, tokens = self.sizes[part]
            # Zeros: what was never written is multiplied by a weight of zero, which does not cure a NaN. In the dtype
            # that attention computes in: under autocast keys come in fp32, and would be cast anew in every step.
            store[layer] = tuple(
                torch.zeros(n, x.shape[1], tokens, x.shape[3], dtype=computed_in(x.device, x.dtype), device=x.device)
                for x in (keys, values)
            )
        return store[layer]

    def take(self, rows: Tensor, slots: Tensor | None) -> None:
        """Leave only some rows, and slots where there are some, in that order."""
        for part, index in (("own", rows), ("prompt", slots)):
            store = getattr(self, part)
            if index is not None:
                self.sizes[part] = (len(index), self.sizes[part][1])
                for layer, kept in store.items():
                    store[layer] = tuple(x.index_select(0, index) for x in kept)

    def reorder(self, rows: Tensor, width: int) -> None:
        """Give every row the own tokens of another one."""
        for kept in self.own.values():
            for x in kept:
                x[:, :, :width].copy_(x[:, :, :width].index_select(0, rows))


@dataclass(frozen=True)
class Prompts:
    """Which rows complete which prompt.

    Attributes:
        lengths: [S'] tokens that are kept of the prompt in each of the first S' slots.
        width: The most of them.
        members: [S', M] rows of each slot; what is left of M names any row.
        place: [B] each row's place in `members`, flattened.
    """

    lengths: Tensor
    width: int
    members: Tensor
    place: Tensor


def _bias(lengths: Tensor, width: int) -> Tensor:
    """[n, 1, 1, width] what is added to scores: nothing for as many keys as each row has."""
    unseen = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return (unseen * NEVER)[:, None, None]


def _size(scores: Tensor, weights: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials that `weights` were divided by; cheaper than to sum them anew."""
    return scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rollout: KV | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; the signature is transformers'.

    Args:
        module: The attention layer.
        query: [n, heads, tokens, D].
        key: [n, key heads, tokens, D] of the same tokens.
        value: The same.
        attention_mask: Not read: prompts begin at their first token, what pads them comes after, and rows of a step see
            what the cache says.
        scaling: Factor of the scores.
        rollout: The cache.
        **kwargs: What other attention functions read.

    Returns:
        [n, tokens, heads, D], and no attention weights.
    """
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"its attention has {', '.join(unknown)}")
    if rollout is None:
        raise ValueError("its attention is not told of the cache")
    if rollout.at is not None:
        return rollout.attend(module.layer_idx, query, scaling).to(query.dtype), None
    dtype = computed_in(query.device, query.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)


@contextmanager
def rollout_attention(body: Any) -> Iterator[None]:
    """The body of a model attends by `attention` meanwhile."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = body.config._attn_implementation
    body.set_attn_implementation(NAME)
    try:
        yield
    finally:
        body.set_attn_implementation(before)
