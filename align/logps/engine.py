"""Which packing a model gets: the rule of `align/recipe/packing.py`, proven on the model itself before the first step.

`python -m bench.preference` measures the packings beside one another.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Literal

import torch

from align.data.chat import Completion, Example
from align.logps.attention import NAME, kernel_of, register
from align.logps.head import hidden_states
from align.logps.pack import Packing, pack_examples
from align.logps.precision import computed_in
from align.recipe.packing import PackingChoice, choose, padded

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of hidden states, relative to their size, between two layouts of the same sequences."""

Wanted = Literal["auto", "rows", "flat", "shared"]


def choose_engine(causal_lm: Any, *, dropout: bool, wanted: Wanted) -> PackingChoice:
    """Make the model ready for the packing it will get, and say which that is.

    Args:
        causal_lm: The model as a role sees it; every rank has to call this.
        dropout: Whether adapters draw dropout.
        wanted: What the recipe asks for; `auto` is the rule.
    """
    config = causal_lm.config.get_text_config().to_dict()
    choice = choose(config, dropout=dropout, wanted=wanted, kernel="blocks")
    if choice.packing != "rows":
        device = next(causal_lm.parameters()).device
        choice = replace(choice, attention=kernel_of(device.type, computed_in(device, causal_lm.model.dtype)))
        reason = _prove(causal_lm)
        choice = choice if reason is None else padded(reason)
    if wanted not in ("auto", choice.packing):
        logger.warning("packing %s was asked for; it is %s", wanted, choice)
    return choice


def choose_packing(causal_lm: Any, *, dropout: bool, wanted: Wanted) -> Packing:
    """The packing alone of what `choose_engine` chooses."""
    return choose_engine(causal_lm, dropout=dropout, wanted=wanted).packing


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
