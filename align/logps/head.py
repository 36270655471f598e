"""Log-probabilities of the trained tokens, from hidden states at their positions only.

Logits of B x T x V never exist: the head sees the N states that predict a trained token, a tile at a time, and a tile's
logits are computed again in the backward pass. Shape letters: N trained tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.errors import TrainingError
from align.logps.pack import Pack

TILE_ELEMENTS = 2**24
"""Most logits (tokens x vocabulary) that exist at once: 64 MiB in fp32."""


def token_logps(causal_lm: Any, pack: Pack) -> Tensor:
    """[N] log-probabilities of the trained tokens of a pack, in nats, fp32.

    No attention mask is passed: rows are padded on the right, so it would not change a real token, and without it the
    fast causal kernel is used.
    """
    hidden = causal_lm.model(input_ids=pack.input_ids, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)
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
    hidden = causal_lm.model(input_ids=pack.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    if pack.completions == 0:
        return head(hidden[:1].float())[:0, 0]
    return head(hidden.index_select(0, pack.last).float())[:, 0]


def _through_head(lm_head: Any, states: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """All tiles inside one call of the head.

    Every call of a module gathers its weight under ZeRO-3, and ranks have to gather equally often; how many tiles a
    rank has depends on its own tokens.
    """
    own_forward, tile = lm_head.forward, max(1, TILE_ELEMENTS // vocabulary)

    def tiled(states: Tensor, targets: Tensor) -> Tensor:
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
