"""An estimate of the memory of one rank, part by part.

Weights, gradients and optimizer states are counted; activations are a fit; what the allocator and the libraries take on
top is left out.
"""

from __future__ import annotations

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
TILE_ELEMENTS = 2**22
"""Logits that exist at once; see `align/logps/head.py`."""
TILE_COPIES = 3
"""Their compute-dtype and fp32 values and their gradient."""
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
    scores: bool = False,
) -> Parts:
    """Bytes of one rank of a training stage, at its peak.

    Args:
        size: The model.
        model: Quantization, adapter, checkpointing.
        launch: Ranks and ZeRO stage.
        pack_tokens: Tokens of one forward pass.
        compute_bytes: Bytes of a number in the compute dtype.
        frozen_adapters: Adapters beside the trained one: the reference's.
        critic: Whether a second adapter is trained beside it, with a scalar head.
        scores: Whether a scalar head is trained instead of log-probabilities being taken: there are no logits then.
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
    parts = {
        "base": base // shared_from(3),
        "trained weights": trained * weight // shared_from(3),
        "frozen adapters": frozen_adapters * adapter * weight // shared_from(3),
        "gradients": trained * weight * buckets // shared_from(2),
        "optimizer": trained * (ADAM_BYTES + master) // shared_from(1),
        "autocast": trained * compute_bytes if lora is None and weight > compute_bytes else 0,
        "gathered": min(whole, whole * LIVE_PARAMETERS // size.parameters) if shared_from(3) > 1 else 0,
        "activations": _activations(size, model, pack_tokens, compute_bytes) * (2 if critic else 1),
        "head": 0 if scores else TILE_COPIES * 4 * min(pack_tokens * size.vocabulary, TILE_ELEMENTS),
    }
    return {name: bytes_ for name, bytes_ in parts.items() if bytes_}


def _activations(size: ModelSize, model: ModelSettings, tokens: int, compute_bytes: int) -> int:
    kind = "lora" if isinstance(model.adapter, LoraSettings) else "full"
    a, b = KEPT_PER_LAYER[kind, compute_bytes]
    layer = a * size.hidden + b * size.intermediate + 2 * size.keys
    if model.gradient_checkpointing:  # the input of every layer, and one layer that is computed again
        return tokens * compute_bytes * (size.layers * size.hidden + layer)
    return tokens * compute_bytes * size.layers * layer


def generation_memory(size: ModelSize, settings: GenerationSettings, compute_bytes: int) -> Parts:
    """Bytes of keys, values and logits while completions are drawn, for prompts as long as their completions."""
    tokens = settings.batch_size * 2 * settings.max_new_tokens
    return {
        "keys and values": 2 * size.layers * size.keys * compute_bytes * tokens,
        "logits": settings.batch_size * size.vocabulary * 4,
    }
