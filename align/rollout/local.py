"""Generation in this process: transformers' own `generate`, with draws that do not depend on how prompts are batched.

Every prompt has its own row of uniform numbers, made from the seed and its place in the list; a token is the one whose
slice of the cumulative distribution holds the number. So the batch size changes speed alone (up to the rounding of
logits), and two policies asked with one seed get common random numbers, which makes their comparison sharper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from align.errors import RecipeError
from align.models.tokenizer import end_ids
from align.spec.stages import GenerationSettings


def generate(
    roles: Any,
    role: str,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Draw one completion per prompt. The same call gives the same completions.

    Only `settings` decide the distribution: a repetition penalty or a temperature in the model's own generation config
    is not applied. Generation ends with any token that ends a turn, see `end_ids`.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP.
        role: Which of its roles speaks.
        prompts: Token ids, generation prompt included.
        settings: Length, temperature, top_p, seed, batch size.
        tokenizer: Decides padding and the ends of turns.

    Returns:
        Token ids of the completions in the order of the prompts, the ending token included if one was drawn.

    Raises:
        RecipeError: If a prompt and its completion would not fit into the model's positions.
    """
    _check_room(roles, prompts, settings.max_new_tokens)
    draws = torch.rand(
        len(prompts),
        settings.max_new_tokens,
        generator=torch.Generator().manual_seed(settings.seed),
        dtype=torch.float64,
    )
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: list[list[int]] = [[] for _ in prompts]
    device = next(roles.parameters()).device
    with torch.no_grad(), _eval_mode(roles):
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            input_ids, attention_mask = _pad_left([prompts[i] for i in rows], tokenizer.pad_token_id)
            sampler = None
            if settings.temperature > 0:
                sampler = _Sampler(draws[rows].to(device), input_ids.shape[1], settings)
            completions = roles(
                role, _complete, input_ids.to(device), attention_mask.to(device), settings, tokenizer, sampler
            )
            for i, completion in zip(rows, completions, strict=True):
                found[i] = completion
    return found


def _complete(
    causal_lm: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
    sampler: LogitsProcessor | None,
) -> list[list[int]]:
    """Complete one batch [B, T]; runs inside `RoleModel.forward`."""
    ends = end_ids(tokenizer) | _as_set(causal_lm.generation_config.eos_token_id)
    own = causal_lm.generation_config
    # `generate` fills what a config leaves open from the model's own, so that one steps aside.
    causal_lm.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        output = causal_lm.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
        )
    finally:
        causal_lm.generation_config = own
    return [_until(row, ends) for row in output[:, input_ids.shape[1] :].tolist()]


class _Sampler(LogitsProcessor):
    """Draws a token by inverse transform sampling and leaves it as the only one that greedy search can take.

    Args:
        draws: [B, max_new_tokens] uniform numbers in [0, 1).
        prompt_tokens: Width of the padded prompts.
        settings: Reads `temperature` and `top_p`.
    """

    def __init__(self, draws: Tensor, prompt_tokens: int, settings: GenerationSettings) -> None:
        self.draws, self.prompt_tokens = draws, prompt_tokens
        self.temperature, self.top_p = settings.temperature, settings.top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draw = self.draws[:, input_ids.shape[1] - self.prompt_tokens, None]
        probabilities = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)  # keeps the token that crosses top_p
        cumulative = probabilities.double().cumsum(-1)
        chosen = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        if self.top_p < 1:
            chosen = tokens.gather(-1, chosen)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


def _pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, T] ids and mask; prompts end where completions begin."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and including the first ending token; what follows it is padding."""
    return next((ids[: t + 1] for t, token in enumerate(ids) if token in ends), ids)


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _check_room(roles: Any, prompts: Sequence[list[int]], new_tokens: int) -> None:
    config = getattr(roles, "module", roles).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if positions is not None and longest + new_tokens > positions:
        raise RecipeError(
            f"a prompt of {longest} tokens and {new_tokens} new ones do not fit into the model's {positions} positions",
            where="generation.max_new_tokens",
            fix=f"set it to at most {positions - longest}, or leave long prompts out",
        )


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which would throw the cache away."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
