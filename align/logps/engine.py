"""Which packing a model gets: measured on CPU, proven on the model itself before the first step.

The rule: a prompt is shared by its completions where the model can (ordinary attention in every layer). Dropout draws
anew for every copy of a token, so with dropout each completion has its own copy of the prompt, still without padding.
Models with other layers get padded rows, which any model computes. `python -m bench.preference` measures all three.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch

from align.data.chat import Completion, Example
from align.logps.attention import NAME, register
from align.logps.head import hidden_states
from align.logps.pack import Packing, pack_examples
from align.logps.precision import computed_in

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of hidden states, relative to their size, between two layouts of the same sequences."""


def why_not_flat(config: Any) -> str | None:
    """Why a model cannot compute flat packs; None if it can as far as its configuration tells.

    Args:
        config: A transformers configuration; its text part is read.
    """
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        return f"it has layers of type {', '.join(sorted(layers - {'full_attention'}))}"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return "its attention slides over a window"
    return None


def choose_packing(causal_lm: Any, *, dropout: bool, wanted: Literal["auto", "rows", "flat", "shared"]) -> Packing:
    """Make the model ready for the packing it will get, and say which that is.

    Args:
        causal_lm: The model as a role sees it; every rank has to call this.
        dropout: Whether adapters draw dropout.
        wanted: What the recipe asks for; `auto` is the rule above.
    """
    if wanted == "rows":
        return "rows"
    reason = why_not_flat(causal_lm.config) or _prove(causal_lm)
    level = logging.INFO if wanted == "auto" else logging.WARNING
    if reason is not None:
        logger.log(level, "completions stand in padded rows of their own: %s", reason)
        return "rows"
    if dropout and wanted != "flat":
        logger.log(level, "no prompt is shared: adapters have dropout, which draws anew for every copy of a token")
    return "flat" if dropout or wanted == "flat" else "shared"


@torch.no_grad()
def _prove(causal_lm: Any) -> str | None:
    """Compute three small examples as padded rows and as a shared pack; why the second is not possible, or None."""
    body, vocabulary = causal_lm.model, causal_lm.config.get_text_config().vocab_size
    before = causal_lm.config.get_text_config()._attn_implementation
    register()
    examples = [_example(prompt, lengths, vocabulary) for prompt, lengths in ((5, (3, 4)), (2, (1, 6, 2)), (3, (4,)))]
    device = next(causal_lm.parameters()).device
    (rows,) = pack_examples(examples, 10_000)
    (shared,) = pack_examples(examples, 10_000, packing="shared")
    rows, shared = rows.to(device), shared.to(device)
    expected = hidden_states(causal_lm, rows)[rows.positions].float()
    try:
        body.set_attn_implementation(NAME)
        found = hidden_states(causal_lm, shared)[shared.positions].float()
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        body.set_attn_implementation(before)
        return f"{type(error).__name__}: {error}"
    # Against what tells tokens apart: a direction that all states share would hide a difference.
    scale = (expected - expected.mean(0)).norm(dim=-1).mean().clamp(min=1e-6)
    difference = float((found - expected).norm(dim=-1).max() / scale)
    if difference <= TOLERANCE[computed_in(device, body.dtype)]:
        return None
    body.set_attn_implementation(before)
    return f"a shared prompt changes its hidden states by {difference:.2g}"


def _example(prompt: int, lengths: tuple[int, ...], vocabulary: int) -> Example:
    ids = lambda n, first: [(first + 7 * i) % vocabulary for i in range(n)]  # noqa: E731
    completions = tuple(Completion(ids(n, 11 + 3 * k), [True] * n, False) for k, n in enumerate(lengths))
    return Example(0, ids(prompt, 3 + prompt), completions, 1.0)
