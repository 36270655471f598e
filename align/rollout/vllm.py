"""Completions by vLLM, for policies that are a LoRA adapter on a base it can load.

Experimental: vLLM needs a GPU and has not been run with this. The base is loaded a second time, by vLLM; each call
writes the role's adapter to a folder for it to read. Log-probabilities are computed by the policy itself, since it is
their ratio to its own later ones that training reads, and other kernels round in another way.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import LaunchError, RecipeError
from align.models.save import save_policy
from align.rollout.draws import Draws
from align.rollout.engine import Sampled, Synced, Tell
from align.rollout.request import Request, drawing
from align.rollout.rescore import rescored
from align.spec.stages import GenerationSettings

MEMORY_SHARE = 0.4
"""Of a GPU's memory that vLLM may take; the policy is on the same one."""
_numbers = itertools.count(1)
"""vLLM keeps adapters by number."""


class VllmEngine:
    """vLLM as an `Engine`.

    Raises:
        LaunchError: It is not installed.
    """

    def __init__(self) -> None:
        try:
            self.vllm = import_module("vllm")  # by name, as it is no dependency of align's
        except ImportError as error:
            raise LaunchError(
                "the engine `vllm` is not installed", where="engine", fix="pip install vllm, or use `engine: local`"
            ) from error

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
            LaunchError: Weights are in parts (ZeRO-3).
            RecipeError: The role is trained in full, so that vLLM's copy of the base is not its own.
        """
        if synced is not None:
            raise LaunchError("the engine `vllm` cannot read weights under ZeRO-3", fix="use `engine: local`, or zero2")
        bare = getattr(roles, "module", roles)
        if bare.adapter_config(role) is None and role in bare.trained_roles:
            raise RecipeError(
                f"`{role}` is trained in full, and vLLM has its base only",
                where="engine",
                fix="train an adapter, or use `engine: local`",
            )
        request = Request(prompts, settings, tokenizer, completions, tell=tell)
        request.check(bare.config)
        if not prompts:
            return []
        ends = request.ends(bare.causal_lm)
        outputs = self._generate(bare, role, request, ends)
        ids = [[list(each.token_ids) for each in output.outputs] for output in outputs]
        stopped = [[each.finish_reason == "stop" for each in output.outputs] for output in outputs]
        with drawing(roles):
            logps = rescored(roles, role, prompts, ids, settings.temperature)
        if tell is not None:
            tell(request.total, request.total)
        return [[Sampled(*one) for one in zip(*own, strict=True)] for own in zip(ids, logps, stopped, strict=True)]

    def _generate(self, roles: Any, role: str, request: Request, ends: set[int]) -> list[Any]:
        settings = request.settings
        params = self.vllm.SamplingParams(
            n=request.completions,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            seed=settings.seed,
            stop_token_ids=sorted(ends),
            stop=list(settings.stop) or None,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in request.prompts]
        config, base = roles.adapter_config(role), roles.config._name_or_path
        llm = _model(base, getattr(roles.base, "is_loaded_in_4bit", False), config.r if config else 0)
        if config is None:
            return llm.generate(inputs, params, use_tqdm=False)
        with tempfile.TemporaryDirectory() as folder:
            adapter = save_policy(roles, role, Path(folder), tokenizer=request.tokenizer, base_reference=base)
            lora = import_module("vllm.lora.request").LoRARequest(role, next(_numbers), str(adapter))
            return llm.generate(inputs, params, lora_request=lora, use_tqdm=False)


@cache
def _model(base: str, quantized: bool, rank: int) -> Any:
    """vLLM's copy of a base; made once."""
    options: dict[str, Any] = {"quantization": "bitsandbytes"} if quantized else {}
    if rank:
        options |= {"enable_lora": True, "max_lora_rank": max(8, rank)}
    return import_module("vllm").LLM(
        model=base, gpu_memory_utilization=MEMORY_SHARE, enable_prefix_caching=True, **options
    )
