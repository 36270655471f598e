"""Log-probabilities of the trained tokens, from hidden states at their positions only.

Logits of B x T x V never exist: the head sees the N states that predict a trained token, a tile at a time. For a frozen
head, d log p(y) / d h = W[y] - sum_v p_v W[v] does not depend on the loss, so it is computed beside the log-probability
while the tile's logits are there: 4 N H V operations in all, none in the backward pass. A trained head computes a
tile's logits again in the backward pass. Shape letters: N trained tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.errors import TrainingError
from align.logps.pack import Pack
from align.logps.precision import computed_in

TILE_ELEMENTS = 2**22
"""Most logits (tokens x vocabulary) that exist at once: 16 MiB in fp32, which a CPU's caches hold."""
TILE_ELEMENTS_CUDA = 2**26
"""The same on a GPU, which reads the whole head once per tile: 256 MiB."""


def token_logps(causal_lm: Any, pack: Pack) -> Tensor:
    """[N] log-probabilities of the trained tokens of a pack, in nats, fp32."""
    hidden = hidden_states(causal_lm, pack)
    if pack.targets.numel() == 0:
        # Touch body and head, so that every trained parameter takes part in the backward pass of every rank.
        return causal_lm.lm_head(hidden[:1]).float().sum(-1)[:0]
    states = hidden.index_select(0, pack.positions)
    return _through_head(causal_lm.lm_head, states, pack.targets, causal_lm.config.get_text_config().vocab_size)


def last_rewards(causal_lm: Any, pack: Pack, head: Any) -> Tensor:
    """[C] rewards, fp32: the scalar head on the state of each completion's last token.

    Args:
        causal_lm: The base with the role's adapter active.
        pack: The completions.
        head: [1, H] linear layer in fp32.
    """
    hidden = hidden_states(causal_lm, pack)
    if pack.completions == 0:
        return head(hidden[:1].float())[:0, 0]
    return head(hidden.index_select(0, pack.last).float())[:, 0]


def hidden_states(causal_lm: Any, pack: Pack) -> Tensor:
    """[R * T, H] last hidden states.

    Padded rows get no attention mask: the padding is on the right, so it would not change a real token, and without it
    the fast causal kernel is used. A flat pack hands its segments to the attention function of every layer; the mask of
    one element keeps transformers from making one of T x T, and nobody reads it.
    """
    if pack.segments is None:
        return causal_lm.model(input_ids=pack.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    out = causal_lm.model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pack.input_ids.device),
        segments=pack.segments,
        use_cache=False,
    )
    return out.last_hidden_state.flatten(0, 1)


def _through_head(lm_head: Any, states: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """All tiles inside one call of the head.

    Every call of a module gathers its weight under ZeRO-3, and ranks have to gather equally often; how many tiles a
    rank has depends on its own tokens.
    """
    elements = TILE_ELEMENTS_CUDA if states.is_cuda else TILE_ELEMENTS
    own_forward, tile = lm_head.forward, max(1, elements // vocabulary)
    frozen = type(lm_head) is nn.Linear and not any(p.requires_grad for p in lm_head.parameters())

    def tiled(states: Tensor, targets: Tensor) -> Tensor:
        if frozen and torch.is_grad_enabled() and states.requires_grad:
            return _FrozenHead.apply(states, targets, lm_head.weight, lm_head.bias, tile)
        tiles = list(zip(states.split(tile), targets.split(tile), strict=True))
        if len(tiles) == 1 or not torch.is_grad_enabled():
            return torch.cat([_tile(own_forward, h, y) for h, y in tiles])
        return torch.cat([checkpoint(_tile, own_forward, h, y, use_reentrant=False) for h, y in tiles])

    replaced = vars(lm_head).get("forward")
    lm_head.forward = tiled
    try:
        return lm_head(states, targets)
    finally:
        if replaced is None:
            del lm_head.forward
        else:
            lm_head.forward = replaced


def _tile(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(head(states).float(), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities through a head without gradient of its own; keeps [N, H] for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
        weight = weight.to(computed_in(states.device, weight.dtype))
        values = states.new_empty(len(states), dtype=torch.float32)
        slopes = torch.empty_like(states)
        for start in range(0, len(states), tile):
            rows = slice(start, start + tile)
            y = targets[rows, None]
            scores = F.linear(states[rows].to(weight.dtype), weight, bias).float()
            normaliser = scores.logsumexp(-1, keepdim=True)
            values[rows] = (scores.gather(1, y) - normaliser)[:, 0]
            # onehot - p in fp32 before it is rounded: for a likely token, W[y] - p @ W would cancel to nothing in bf16.
            shares = scores.sub_(normaliser).exp_().neg_()
            shares.scatter_add_(1, y, torch.ones_like(shares[:, :1]))
            slopes[rows] = (shares.to(weight.dtype) @ weight).to(states.dtype)
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None, None, None, None


def check_head(causal_lm: Any) -> None:
    """Prove on a few tokens that body + head gives what the model's own forward gives.

    Some models scale or cap their logits after the head; training them through the bare head would be silently wrong.

    Raises:
        TrainingError: If the two disagree.
    """
    device = next(causal_lm.parameters()).device
    ids = torch.arange(1, 9, device=device).unsqueeze(0) % causal_lm.config.get_text_config().vocab_size
    with torch.no_grad():
        own = causal_lm.lm_head(causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state).float()
        full = causal_lm(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(own, full, rtol=1e-3, atol=1e-3):
        kind = causal_lm.config.model_type
        raise TrainingError(
            f"models of type {kind!r} change their logits after the head (by {float((own - full).abs().max()):.3g}), "
            "which the log-prob engine does not reproduce",
            where="model.base",
            fix="use a model whose logits are lm_head(hidden states), such as Llama, Qwen or Mistral",
        )
