"""An estimate of the memory of one rank, part by part.

Weights, gradients and optimizer states are counted; activations are a fit; what the allocator and the libraries take on
top is left out. `python -m bench.rlhf_memory` measures beside it.
"""

from __future__ import annotations

from typing import Literal

from align.recipe.sizes import ModelSize
from align.spec.model import LoraSettings, ModelSettings
from align.spec.stages import GenerationSettings
from align.spec.train import LaunchSettings

Parts = dict[str, int]
"""What the bytes are for -> bytes."""

MASTER_BYTES = 4
"""Trained weights are updated in fp32."""
ADAM_BYTES = 8
"""Two fp32 moments per trained parameter."""
TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that exist at once; see `align/logps/head.py`."""
Entropy = Literal["none", "metric", "bonus"]
TILE_COPIES: dict[Entropy, int] = {"none": 3, "metric": 5, "bonus": 8}
"""How often they exist, in fp32: with their gradient, and with what their entropy and its gradient are made from."""
SAMPLED_COPIES = {"all": 4, "likeliest": 8}
"""The same of the logits that tokens are drawn from: of all tokens, or of the likeliest ones after sorting."""
PREFILL_TOKENS = 8192
"""Tokens of prompts that are computed in one pass; see `align/rollout/loop.py`."""
WORKING = 4
"""Hidden and intermediate states of a token that one layer works on at once, beside what is kept: a fit."""
LIVE_PARAMETERS = 10**9
"""ZeRO-3 keeps at most so many gathered parameters (`stage3_max_live_parameters`, the default)."""

KEPT_PER_LAYER = {("lora", 4): (6, 4), ("lora", 2): (18, 5), ("full", 4): (8, 4), ("full", 2): (10, 4)}
"""(what is trained, bytes of the compute dtype) -> a, b.

Per token a layer keeps a x hidden + b x intermediate + 2 x keys numbers for the backward pass: a fit to what autograd
saves in transformers' Llama with SDPA. Adapters in fp32 copy their bf16 inputs.
"""


def training_memory(
    size: ModelSize,
    model: ModelSettings,
    launch: LaunchSettings,
    *,
    pack_tokens: int,
    compute_bytes: int,
    frozen_adapters: int = 0,
    critic: bool = False,
    at_once: bool = False,
    scores: bool = False,
    entropy: Entropy = "none",
    device: Literal["cpu", "cuda"] = "cpu",
) -> Parts:
    """Bytes of one rank of a training stage, at the peak of an optimizer step.

    Args:
        size: The model.
        model: Quantization, adapter, checkpointing.
        launch: Ranks and ZeRO stage.
        pack_tokens: Tokens of one forward pass.
        compute_bytes: Bytes of a number in the compute dtype.
        frozen_adapters: Adapters beside the trained one: the reference's.
        critic: Whether a second adapter is trained beside it, with a scalar head.
        at_once: Whether both are trained on a pack in the same pass, and not in one pass each.
        scores: Whether a scalar head is trained instead of log-probabilities being taken: there are no logits then.
        entropy: Whether that of the policy is taken too, and with a gradient.
        device: Where the stage runs.
    """
    zero, ranks = 0 if launch.deepspeed == "none" else int(launch.deepspeed[-1]), launch.processes

    def shared_from(stage: int) -> int:
        return ranks if zero >= stage else 1

    lora = model.adapter if isinstance(model.adapter, LoraSettings) else None
    adapter = 0 if lora is None else size.adapter_parameters(lora)
    trained = (adapter or size.parameters) * (2 if critic else 1) + (size.hidden if scores or critic else 0)
    # DeepSpeed trains in the compute dtype beside an fp32 copy; without it the weights themselves are fp32.
    weight = compute_bytes if zero else MASTER_BYTES
    master = MASTER_BYTES if zero else 0
    buckets = 2 if ranks > 1 and not zero else 1  # DDP reduces a copy of the gradients
    base = size.frozen_bytes(model.quantization, compute_bytes) if lora else 0
    whole = base or trained * weight
    kept = _activations(size, model, pack_tokens, compute_bytes)
    tiles = 0 if scores else TILE_COPIES[entropy] * 4 * min(pack_tokens * size.vocabulary, TILE_ELEMENTS[device])
    tiles -= kept if at_once else 0  # the critic's activations are not there yet while the policy's logits are
    working = _working(size, pack_tokens, compute_bytes)
    parts = {
        "base": base // shared_from(3),
        "trained weights": trained * weight // shared_from(3),
        "frozen adapters": frozen_adapters * adapter * weight // shared_from(3),
        "gradients": trained * weight * buckets // shared_from(2),
        "optimizer": trained * (ADAM_BYTES + master) // shared_from(1),
        "autocast": trained * compute_bytes if lora is None and weight > compute_bytes else 0,
        "gathered": min(whole, whole * LIVE_PARAMETERS // size.parameters) if shared_from(3) > 1 else 0,
        "activations": kept * (2 if at_once else 1),
        "head" if tiles > working else "backward": max(tiles, working),
    }
    return {name: bytes_ for name, bytes_ in parts.items() if bytes_}


def _activations(size: ModelSize, model: ModelSettings, tokens: int, compute_bytes: int) -> int:
    kind = "lora" if isinstance(model.adapter, LoraSettings) else "full"
    a, b = KEPT_PER_LAYER[kind, compute_bytes]
    layer = a * size.hidden + b * size.intermediate + 2 * size.keys
    if model.gradient_checkpointing:  # the input of every layer, and one layer that is computed again
        return tokens * compute_bytes * (size.layers * size.hidden + layer)
    return tokens * compute_bytes * size.layers * layer


def _working(size: ModelSize, tokens: int, compute_bytes: int) -> int:
    """Bytes that a layer works on, in a pass that keeps nothing and in the backward pass."""
    return tokens * compute_bytes * WORKING * (size.hidden + size.intermediate)


def generation_memory(
    size: ModelSize, settings: GenerationSettings, compute_bytes: int, *, completions: int | None = None
) -> Parts:
    """Bytes of keys, values and what a pass works on while completions are drawn, for prompts as long as they are.

    Args:
        size: The model.
        settings: Reads `batch_size`, `max_new_tokens`, and whether the likeliest tokens alone are drawn from.
        compute_bytes: Bytes of a number in the compute dtype.
        completions: How many there are in all; enough for `batch_size` if absent.
    """
    rows = min(settings.batch_size, completions or settings.batch_size)
    prompts = rows * settings.max_new_tokens
    copies = SAMPLED_COPIES["likeliest" if settings.top_p < 1 else "all"]
    logits = copies * 4 * rows * size.vocabulary
    prefill = _working(size, min(prompts, max(PREFILL_TOKENS, settings.max_new_tokens)), compute_bytes)
    return {
        "keys and values": 2 * size.layers * size.keys * compute_bytes * 2 * prompts,
        "logits" if logits > prefill else "prompts": max(logits, prefill),
    }
