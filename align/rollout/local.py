"""Completions drawn in this process by align's own decode loop; by transformers' `generate` where a model needs it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.rollout import padded
from align.rollout.draws import Draws
from align.rollout.engine import Sampled, Synced, Tell
from align.rollout.kv import rollout_attention
from align.rollout.loop import Loop
from align.rollout.proof import why_not
from align.rollout.request import Request, drawing
from align.spec.stages import GenerationSettings

logger = logging.getLogger(__name__)


def sample(
    roles: Any,
    role: str,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completions: int = 1,
    draws: Draws | None = None,
    tell: Tell | None = None,
    synced: Synced | None = None,
) -> list[list[Sampled]]:
    """Draw completions. The same call gives the same ones, whatever the batch size and the order of prompts.

    Only `settings` decide the distribution: a repetition penalty or a temperature in the model's own generation config
    is not applied. A completion ends with any token that ends a turn, see `end_ids`, or with a stop string. One call is
    one call of `roles`, without prompts too, as DDP wants it of every rank.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
        role: Which of its roles speaks.
        prompts: Token ids, generation prompt included.
        settings: Length, temperature, top_k, top_p, stop strings, seed, and how many rows are drawn side by side.
        tokenizer: Decides padding, the ends of turns, and what text stop strings are looked for in.
        completions: Per prompt.
        draws: The uniform numbers of each completion; `listed_draws` if None.
        tell: Called with completions done and in all, whenever some are done.
        synced: For ZeRO-3, where a pass on one rank needs all others: called before every pass with whether this rank
            has work left, it says whether any rank has; one that has none goes on with empty passes.

    Returns:
        For each prompt its completions.

    Raises:
        RecipeError: If a prompt and its completion would not fit into the model's positions.
    """
    request = Request(prompts, settings, tokenizer, completions, draws, tell, synced)
    request.check(getattr(roles, "module", roles).config)
    with drawing(roles):
        return roles(role, _complete, request)


def _complete(causal_lm: Any, request: Request, *_: Any) -> list[list[Sampled]]:
    """Runs inside `RoleModel.forward`, which hands the scalar head of a role that has one to everybody."""
    reason = why_not(causal_lm, request.longest + request.settings.max_new_tokens, request.synced)
    if reason is not None:
        logger.warning("completions are drawn by transformers' generate, which is slower: %s", reason)
        return padded.complete(causal_lm, request)
    with rollout_attention(causal_lm.model):
        rows = request.settings.batch_size
        while (found := _drawn(causal_lm, request, rows)) is None:
            rows //= 2
            gc.collect()
            torch.cuda.empty_cache()
            logger.warning("the cache of so many completions does not fit into memory: trying %d side by side", rows)
        return found


def _drawn(causal_lm: Any, request: Request, rows: int) -> list[list[Sampled]] | None:
    """All completions, the same for any number of rows; None if half of the rows may fit into memory and these do not.

    Raises:
        torch.OutOfMemoryError: One row does not fit either, or other ranks wait for this one.
    """
    try:
        return Loop(causal_lm, request, rows).run()
    except torch.OutOfMemoryError:
        if rows == 1 or request.synced is not None:
            raise
    return None


def generate(
    roles: Any,
    role: str,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Draw one completion per prompt, see `sample`.

    Returns:
        Token ids of the completions in the order of the prompts, the ending token included if one was drawn.
    """
    return [own[0].ids for own in sample(roles, role, prompts, settings, tokenizer)]


class LocalEngine:
    """`sample` as an `Engine`."""

    sample = staticmethod(sample)
