"""Completions by transformers' continuous batching, `generate_batch`: a peer to check and measure our own loop against.

It draws from a generator of its own, so completions depend on the batch; a seed makes a call repeatable. Stop strings
are cut off afterwards, since it does not know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from align.errors import LaunchError, TrainingError
from align.logps.attention import NAME
from align.rollout.draws import Draws
from align.rollout.engine import Sampled, Synced, Tell
from align.rollout.request import Request, drawing
from align.rollout.rescore import rescored
from align.spec.stages import GenerationSettings

PAGE = 32
"""Tokens of a page of its cache, on a CPU, where its own choice takes seconds to set up."""
MEMORY_SHARE = 0.5
"""Of the free memory of a GPU that its cache may take, where a model is trained as well."""


class BatchedEngine:
    """`generate_batch` as an `Engine`."""

    def sample(
        self,
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
        """For each prompt its completions, see `align.rollout.local.sample`; `draws` are not read.

        Raises:
            LaunchError: Ranks would have to be kept in step.
            TrainingError: It failed.
        """
        if synced is not None:
            raise LaunchError("transformers' continuous batching does not run under ZeRO-3", fix="use `engine: local`")
        request = Request(prompts, settings, tokenizer, completions, tell=tell)
        request.check(getattr(roles, "module", roles).config)
        with drawing(roles):
            found = roles(role, _complete, request)
            if settings.temperature > 0 and (settings.top_k is not None or settings.top_p < 1):
                # Its own are of what is left after the cut.
                ids = [[each.ids for each in own] for own in found]
                logps = rescored(roles, role, prompts, ids, settings.temperature)
                found = [
                    [Sampled(each.ids, values, each.ended) for each, values in zip(own, of_own, strict=True)]
                    for own, of_own in zip(found, logps, strict=True)
                ]
        if tell is not None:
            tell(request.total, request.total)
        return found


def _complete(causal_lm: Any, request: Request, *_: Any) -> list[list[Sampled]]:
    """Runs inside `RoleModel.forward`."""
    if not request.prompts:
        return []
    settings, ends = request.settings, sorted(request.ends(causal_lm))
    greedy = settings.temperature == 0
    each = 1 if greedy else request.completions  # pages of a prompt that is there already are shared
    cut = {} if greedy else {"temperature": settings.temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=ends,
        pad_token_id=request.tokenizer.pad_token_id,
        **cut,
    )
    device = next(causal_lm.parameters()).device
    before = causal_lm.config._attn_implementation
    if before == NAME:  # our own function is SDPA where there is no pack, which it does not know
        causal_lm.model.set_attn_implementation("sdpa")
    try:
        with torch.random.fork_rng():
            outputs = causal_lm.generate_batch(
                [list(prompt) for prompt in request.prompts for _ in range(each)],
                generation_config=config,
                continuous_batching_config=_sizes(request, device),
            )
    finally:
        if causal_lm.config._attn_implementation != before:
            causal_lm.model.set_attn_implementation(before)
    drawn = list(outputs.values())
    failed = [output.error for output in drawn if output.error]
    if failed or len(drawn) != len(request.prompts) * each:
        raise TrainingError(
            f"transformers' continuous batching failed: {failed[0] if failed else 'completions are missing'}",
            fix="use `engine: local`",
        )
    found = [_cut(output, request, set(ends)) for output in drawn]
    return [found[i : i + each] * (request.completions // each) for i in range(0, len(found), each)]


def _sizes(request: Request, device: torch.device) -> ContinuousBatchingConfig:
    settings = request.settings
    own: dict[str, Any] = {"max_memory_percent": MEMORY_SHARE}
    if device.type == "cpu":
        pages = -(-(request.longest + settings.max_new_tokens) // PAGE) + 1
        rows = min(settings.batch_size, request.total)
        known = ContinuousBatchingConfig.__dataclass_fields__
        page = "page_size" if "page_size" in known else "block_size"  # before transformers 5.18
        own = {page: PAGE, "num_blocks": rows * pages, "max_batch_tokens": max(256, rows, request.longest)}
    return ContinuousBatchingConfig(
        return_logprobs=True, seed=settings.seed, max_requests_per_batch=settings.batch_size, **own
    )


def _cut(output: Any, request: Request, ends: set[int]) -> Sampled:
    """Up to a stop string."""
    ids, logps = list(output.generated_tokens), list(output.logprobs)
    n = request.stops.first(ids)
    return Sampled(ids[:n], logps[:n], n is not None or ids[-1] in ends)
