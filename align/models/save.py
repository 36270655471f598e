"""Policies and reward models as folders that plain transformers and PEFT load, and adapters merged into their base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    integrations,
)

from align.errors import RecipeError
from align.models.base import Quantization, load_base
from align.models.heads import SCORE
from align.models.roles import RoleModel

ADAPTER = "adapter"
"""Folder of a LoRA adapter inside its artifact."""
MODEL = "model"
"""Folder of a whole model inside its artifact: one trained in full, or a merged base."""


def save_policy(
    roles: RoleModel,
    role: str,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    base_reference: str,
    base_revision: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a role as `adapter/` (PEFT) or `model/` (transformers) with its tokenizer and chat template.

    Tensors are written in their own dtype, so a reload computes the same logits bit for bit. Nothing on disk carries
    the role's name. A role with a scalar head is written as what transformers calls a sequence classifier with one
    label, and its adapter as one of such a model.

    Args:
        roles: The model.
        role: An adapter, or the base itself; with a scalar head or without.
        folder: Folder of the artifact.
        tokenizer: Saved beside the weights; its EOS and pad token become the model's where it has none.
        base_reference: Folder (absolute) or Hub name of the base, for whoever loads the adapter. Unused for a model.
        base_revision: Hub revision of the base.
        state: What to write instead of the role's parameters: `trainable_state` gathered from shards.

    Returns:
        The folder that was written.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in (state or roles.tensors(role)).items()}
    config = roles.adapter_config(role)
    if config is None:
        save = _save_scorer if roles.has_head(role) else _save_model
        return save(roles.base, tensors, folder / MODEL, tokenizer)
    config = copy.copy(config)
    if roles.has_head(role):
        config.task_type, config.modules_to_save = "SEQ_CLS", [SCORE]
    config.base_model_name_or_path, config.revision = base_reference, base_revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set would be written in another order every time
    out = folder / ADAPTER
    config.save_pretrained(str(out))
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out)
    return out


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    quantization: Quantization = "none",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    revision: str | None = None,
    adapter_revision: str | None = None,
) -> Path:
    """Merge an adapter into the base it was trained on and write the result as a model of its own, `model/`.

    A quantised base is dequantised first: the adapter was trained against what the quantised weights mean. Merging into
    4-bit weights would round the adapter away, and the original weights are not what it was trained on. The sum is
    taken in fp32 and written in the compute dtype. (int8 rounds activations too, so there the merged model computes
    almost, not exactly, what was trained.)

    Args:
        base: Folder or Hub name of the base.
        adapter: Its PEFT adapter: a folder or a Hub name.
        folder: Folder of the artifact.
        tokenizer: Saved beside the weights.
        quantization: How the adapter's base was quantised.
        dtype: Compute dtype.
        revision: Hub revision of the base.
        adapter_revision: Hub revision of the adapter.

    Returns:
        The folder that was written.
    """
    from peft import PeftModel

    model = load_base(base, quantization=quantization, dtype=dtype, revision=revision)
    computed_in = model.dtype
    if quantization != "none":
        model = model.dequantize()
    model.float()
    merged = PeftModel.from_pretrained(model, str(adapter), revision=adapter_revision).merge_and_unload()
    merged.to(computed_in)
    return _save_model(merged, dict(merged.named_parameters()), folder / MODEL, tokenizer)


def _save_model(
    model: PreTrainedModel, parameters: Mapping[str, Tensor], out: Path, tokenizer: PreTrainedTokenizerBase
) -> Path:
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    use_cache, model.config.use_cache = model.config.use_cache, True  # off for training only
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*generation")
            model.save_pretrained(out, state_dict={**buffers, **parameters})
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(out)
    return out


def _save_scorer(
    base: PreTrainedModel, parameters: Mapping[str, Tensor], out: Path, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """The body of a causal LM and a scalar head, as the sequence classifier of its kind."""
    model = empty_scorer(base.config)
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id
    kept, body = base.state_dict().keys(), f"{base.base_model_prefix}."
    buffers = {name: b for name, b in base.named_buffers() if name in kept and name.startswith(body)}
    model.load_state_dict({**buffers, **parameters}, assign=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def empty_scorer(config: PretrainedConfig) -> PreTrainedModel:
    """The sequence classifier with one label on the body of a causal LM, without memory for its weights.

    Raises:
        RecipeError: transformers has no such classifier, or one whose head is not a linear layer called `score`.
    """
    config = copy.deepcopy(config)
    config.num_labels, config.use_cache = 1, True
    model = None
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with _in_one_piece(), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    score = getattr(model, SCORE, None)
    if model is None or not isinstance(score, nn.Linear) or score.bias is not None:
        raise RecipeError(
            f"transformers has no sequence classifier with a `{SCORE}` head for models of type {config.model_type!r}, "
            "so nobody could load such a reward model",
            where="model.base",
            fix="use a base such as Llama, Qwen, Mistral or Gemma",
        )
    return model


@contextmanager
def _in_one_piece() -> Iterator[None]:
    """Under ZeRO-3 transformers makes new models in parts, by all ranks together; here one rank makes it alone."""
    kept = integrations.deepspeed._hf_deepspeed_config_weak_ref
    integrations.deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integrations.deepspeed._hf_deepspeed_config_weak_ref = kept
