"""Completions by transformers' `generate` in left-padded batches: it knows the cache of any decoder, and is slower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from align.rollout.engine import Sampled
from align.rollout.request import Found, Request
from align.rollout.sampling import Sampler
from align.rollout.stops import Stops


def complete(causal_lm: Any, request: Request) -> list[list[Sampled]]:
    """For each prompt its completions; runs inside `RoleModel.forward`.

    Only the request decides the distribution: a repetition penalty or a temperature in the model's own generation
    config is not applied.
    """
    found, size = Found(request), request.settings.batch_size
    order = sorted(range(len(request.prompts)), key=lambda i: (len(request.prompts[i]), i))
    rows = [(i, k) for i in order for k in range(request.completions)]
    ends, own = request.ends(causal_lm), causal_lm.generation_config
    # `generate` fills what a config leaves open from the model's own, so that one steps aside.
    causal_lm.generation_config = GenerationConfig(
        max_new_tokens=request.settings.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=request.tokenizer.pad_token_id,
    )
    try:
        while _going(request, bool(rows)):
            batch, rows = rows[:size], rows[size:]
            for (i, k), sampled in zip(batch, _batch(causal_lm, request, batch, ends), strict=False):
                found.add(i, k, sampled)
            found.tell()
    finally:
        causal_lm.generation_config = own
    return found.rows


def _going(request: Request, own: bool) -> bool:
    return own if request.synced is None else request.synced(own)


def _batch(causal_lm: Any, request: Request, batch: Sequence[tuple[int, int]], ends: set[int]) -> list[Sampled]:
    """One call of `generate`; of a token for nothing if the batch is empty, to keep other ranks company."""
    pad_id = request.tokenizer.pad_token_id
    prompts = [request.prompts[i] for i, _ in batch] or [[pad_id]]
    device = next(causal_lm.parameters()).device
    input_ids, attention_mask = _pad_left(prompts, pad_id)
    sampler = Sampler(request.settings)
    draws = None
    if not sampler.greedy:
        numbers = [request.draws(i, k) for i, k in batch] or [torch.zeros(request.settings.max_new_tokens)]
        draws = torch.stack(numbers).double().to(device)
    drawn = _Drawn(sampler, draws, input_ids.shape[1])
    output = causal_lm.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        logits_processor=LogitsProcessorList([drawn]),
        stopping_criteria=StoppingCriteriaList([_Stopped(request.stops, input_ids.shape[1])] if request.stops else []),
        synced_gpus=request.synced is not None,
    )
    ids = output[:, input_ids.shape[1] :].tolist()
    logps = torch.stack(drawn.logps, -1).tolist()
    return [_cut(*row, ends, request.stops) for row in zip(ids, logps, strict=True)]


def _cut(ids: list[int], logps: list[float], ends: set[int], stops: Stops) -> Sampled:
    """Up to where it ended; what follows is padding."""
    by_token = next((t + 1 for t, token in enumerate(ids) if token in ends), None)
    by_string = stops.first(ids[:by_token])
    n = by_string or by_token
    return Sampled(ids[:n], logps[: n or len(ids)], n is not None)


class _Drawn(LogitsProcessor):
    """Draws a token for each row and leaves it as the only one that greedy search can take.

    Args:
        sampler: Draws.
        draws: [B, max_new_tokens] uniform numbers; None if greedy.
        prompt_tokens: Width of the padded prompts.
    """

    def __init__(self, sampler: Sampler, draws: Tensor | None, prompt_tokens: int) -> None:
        self.sampler, self.draws, self.prompt_tokens = sampler, draws, prompt_tokens
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_tokens
        chosen, logps = self.sampler(scores, None if self.draws is None else self.draws[:, step])
        self.logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


class _Stopped(StoppingCriteria):
    """Ends rows that hold a stop string."""

    def __init__(self, stops: Stops, prompt_tokens: int) -> None:
        self.stops, self.prompt_tokens = stops, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        reached = self.stops.reached(input_ids[:, self.prompt_tokens :].tolist())
        return torch.tensor(reached, device=input_ids.device)


def _pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, T] ids and mask; prompts end where completions begin."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask
