"""Base models: load one with its quantization, or make a small one from nothing."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from align.errors import LaunchError
from align.models.platform import compute_dtype, device, prepare_bitsandbytes, prepare_process
from align.models.source import reading
from align.spec.model import Architecture

Quantization = Literal["none", "int8", "nf4"]


def load_base(
    source: str | Path,
    *,
    quantization: Quantization = "none",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    revision: str | None = None,
    scorer: bool = False,
) -> PreTrainedModel:
    """Load a causal LM from safetensors, frozen, in eval mode, without a cache, on this rank's device.

    Quantization reaches the linear layers only; embeddings, norms and head keep the compute dtype. Under ZeRO-3 the
    `TrainingArguments` must exist before this is called; transformers then loads straight into the partitions.

    Args:
        source: Folder or Hub name.
        quantization: `nf4` is 4-bit NormalFloat with double quantization, `int8` is LLM.int8.
        dtype: Compute dtype, see `compute_dtype`.
        revision: Hub revision.
        scorer: Load a sequence classifier instead, see `align.models.rewards`.

    Raises:
        RecipeError: If the folder holds no such model in safetensors.
        LaunchError: If the Hub cannot be reached or memory does not suffice.
    """
    prepare_process()
    computed_in = compute_dtype(dtype)
    options: dict[str, Any] = {"dtype": computed_in, "revision": revision, "use_safetensors": True}
    if quantization != "none":
        prepare_bitsandbytes()
        options["quantization_config"] = quantization_config(quantization, computed_in)
    sharded = is_deepspeed_zero3_enabled()
    if device().type == "cuda" and not sharded:
        options["device_map"] = {"": device()}
    try:
        with reading(source, "reward model" if scorer else "causal LM"):
            auto = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
            base = auto.from_pretrained(str(source), **options)
    except torch.OutOfMemoryError as error:
        gc.collect()
        raise LaunchError(
            f"{source} does not fit into the memory of {device()}", where="model", fix="try `quantization: nf4`"
        ) from error
    return _settled(base)


def quantization_config(quantization: Quantization, computed_in: torch.dtype) -> BitsAndBytesConfig:
    """The bitsandbytes settings behind `int8` and `nf4`."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed_in,
    )


def new_base(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A randomly initialised Llama in fp32; the same seed gives the same weights on every rank and machine.

    Args:
        architecture: Its shape.
        tokenizer: Decides the vocabulary and the special tokens.
        seed: Of the weights. The global random state is left as it was.
    """
    prepare_process()
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads or architecture.heads,
        max_position_embeddings=architecture.max_positions,
        tie_word_embeddings=architecture.tie_embeddings,
        initializer_range=architecture.initializer_range,
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.generation_config = GenerationConfig(**special)
    if not is_deepspeed_zero3_enabled():
        base.to(device())
    return _settled(base)


def without_dropout(base: nn.Module) -> None:
    """Policy and reference must agree at step 0; a base's own dropout would keep them apart. LoRA's is a setting."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def _settled(base: PreTrainedModel) -> PreTrainedModel:
    base.requires_grad_(False)
    base.config.use_cache = False  # a cache in a training forward breaks checkpointing and the isolation of packed rows
    return base.eval()
