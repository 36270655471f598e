"""Log-probabilities of the trained tokens, from hidden states at their positions only.

Logits of B x T x V never exist: the head sees the N states that predict a trained token, a tile at a time. For a frozen
head, d log p(y) / d h = W[y] - sum_v p_v W[v] does not depend on the loss, so it is computed beside the log-probability
while the tile's logits are there: 4 N H V operations in all, none in the backward pass. A trained head computes a
tile's logits again in the backward pass. Shape letters: N trained tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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


def token_logps(causal_lm: Any, pack: Pack, temperature: float = 1.0) -> Tensor:
    """[N] log-probabilities of the trained tokens of a pack, in nats, fp32."""
    return _scored(causal_lm, pack, _Reading(temperature))[0]


def token_logps_and_entropy(
    causal_lm: Any, pack: Pack, temperature: float = 1.0, *, bonus: bool = False
) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the trained tokens, and the entropy of the distributions they are of, in nats, fp32.

    Args:
        causal_lm: The model as a role sees it.
        pack: The tokens.
        temperature: What logits are divided by.
        bonus: Whether the entropy has a gradient.
    """
    return _scored(causal_lm, pack, _Reading(temperature, "bonus" if bonus else "metric"))


@dataclass(frozen=True)
class _Reading:
    """What is read off the logits: at which temperature, and whether with the entropy, and that with gradient."""

    temperature: float = 1.0
    entropy: Literal["none", "metric", "bonus"] = "none"


def _scored(causal_lm: Any, pack: Pack, reading: _Reading) -> tuple[Tensor, Tensor]:
    hidden = hidden_states(causal_lm, pack)
    if pack.targets.numel() == 0:
        # Touch body and head, so that every trained parameter takes part in the backward pass of every rank.
        none = causal_lm.lm_head(hidden[:1]).float().sum(-1)[:0]
        return none, none
    states, vocabulary = hidden.index_select(0, pack.positions), causal_lm.config.get_text_config().vocab_size
    return _through_head(causal_lm.lm_head, states, pack.targets, vocabulary, reading)


def token_values(causal_lm: Any, pack: Pack, head: Any) -> Tensor:
    """[N] values, fp32: the scalar head on the state that each trained token is predicted from.

    Args:
        causal_lm: The base with the role's adapter active.
        pack: The tokens.
        head: [1, H] linear layer in fp32.
    """
    hidden = hidden_states(causal_lm, pack)
    if pack.targets.numel() == 0:
        return head(hidden[:1].float())[:0, 0]
    return head(hidden.index_select(0, pack.positions).float())[:, 0]


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


def _through_head(
    lm_head: Any, states: Tensor, targets: Tensor, vocabulary: int, reading: _Reading
) -> tuple[Tensor, Tensor]:
    """All tiles inside one call of the head.

    Every call of a module gathers its weight under ZeRO-3, and ranks have to gather equally often; how many tiles a
    rank has depends on its own tokens.
    """
    elements = TILE_ELEMENTS_CUDA if states.is_cuda else TILE_ELEMENTS
    own_forward, tile = lm_head.forward, max(1, elements // vocabulary)
    frozen = type(lm_head) is nn.Linear and not any(p.requires_grad for p in lm_head.parameters())

    def tiled(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if frozen and torch.is_grad_enabled() and states.requires_grad:
            values, entropy = _FrozenHead.apply(states, targets, lm_head.weight, lm_head.bias, tile, reading)
            return values, entropy
        tiles = list(zip(states.split(tile), targets.split(tile), strict=True))
        if len(tiles) == 1 or not torch.is_grad_enabled():
            parts = [_tile(own_forward, h, y, reading) for h, y in tiles]
        else:
            parts = [checkpoint(_tile, own_forward, h, y, reading, use_reentrant=False) for h, y in tiles]
        values, entropy = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(entropy)

    replaced = vars(lm_head).get("forward")
    lm_head.forward = tiled
    try:
        return lm_head(states, targets)
    finally:
        if replaced is None:
            del lm_head.forward
        else:
            lm_head.forward = replaced


def _tile(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, reading: _Reading
) -> tuple[Tensor, Tensor]:
    scores = head(states).float()
    if reading.temperature != 1.0:
        scores = scores / reading.temperature
    logps = -F.cross_entropy(scores, targets, reduction="none")
    if reading.entropy == "none":
        return logps, logps.detach()[:0]
    with torch.set_grad_enabled(torch.is_grad_enabled() and reading.entropy == "bonus"):
        log_p = scores.log_softmax(-1)
        return logps, -(log_p.exp() * log_p).sum(-1)


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities through a head without gradient of its own; keeps [N, H] for the backward pass.

    So for the entropy H = -sum_v p_v log p_v, whose gradient -sum_v p_v (log p_v + H) W[v] is another [N, H].
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tile: int,
        reading: _Reading,
    ) -> tuple[Tensor, Tensor]:
        weight = weight.to(computed_in(states.device, weight.dtype))
        values = states.new_empty(len(states), dtype=torch.float32)
        entropy = values.new_empty(len(states) if reading.entropy != "none" else 0)
        slopes = torch.empty_like(states)
        entropy_slopes = torch.empty_like(states) if reading.entropy == "bonus" else slopes[:0]
        for start in range(0, len(states), tile):
            rows = slice(start, start + tile)
            y = targets[rows, None]
            scores = F.linear(states[rows].to(weight.dtype), weight, bias).float()
            if reading.temperature != 1.0:
                scores /= reading.temperature
            normaliser = scores.logsumexp(-1, keepdim=True)
            values[rows] = (scores.gather(1, y) - normaliser)[:, 0]
            if reading.entropy != "none":
                log_p = scores - normaliser
                p = log_p.exp()
                entropy[rows] = -(p * log_p).sum(-1)
                if reading.entropy == "bonus":
                    pull = -p * (log_p + entropy[rows, None]) / reading.temperature
                    entropy_slopes[rows] = (pull.to(weight.dtype) @ weight).to(states.dtype)
            # onehot - p in fp32 before it is rounded: for a likely token, W[y] - p @ W would cancel to nothing in bf16.
            shares = scores.sub_(normaliser).exp_().neg_()
            shares.scatter_add_(1, y, torch.ones_like(shares[:, :1]))
            if reading.temperature != 1.0:
                shares /= reading.temperature
            slopes[rows] = (shares.to(weight.dtype) @ weight).to(states.dtype)
        ctx.save_for_backward(slopes, entropy_slopes)
        if reading.entropy != "bonus":
            ctx.mark_non_differentiable(entropy)
        return values, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes, entropy_slopes = ctx.saved_tensors
        found = slopes * gradients[0][:, None].to(slopes.dtype)
        if len(entropy_slopes):
            found = found + entropy_slopes * gradients[1][:, None].to(slopes.dtype)
        return found, None, None, None, None, None


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
