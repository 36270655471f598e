"""Which model is trained: base, quantization, adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from align.spec.base import Settings, cosmetic, unordered


class LoraSettings(Settings):
    """A low-rank adapter (LoRA, arXiv:2106.09685): W + alpha/rank * B A."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    """Scale numerator; the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: NonNegativeFloat = Field(default=0.0, lt=1.0)
    """Dropout on the adapter's input. Preference methods want 0, so that policy and reference agree at the start."""
    targets: Literal["all-linear"] | list[str] = unordered("all-linear")
    """Module names that get an adapter, or every linear layer but the head."""
    rslora: bool = False


class ModelSettings(Settings):
    """The base model and how it is loaded."""

    base: str
    """A stage of this recipe that trains a base, a folder, or a Hub name of a causal LM."""
    revision: str | None = None
    """Hub revision; resolved to a commit before it is used."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    adapter: LoraSettings | Literal["none"] = LoraSettings()
    """A LoRA adapter, or `none` to train every parameter."""
    merge_parent: bool = False
    """Merge the parent's adapter into the (dequantised) base and start a fresh adapter on the result."""
    gradient_checkpointing: bool = cosmetic(False)
    """Recompute activations in the backward pass: less memory, about a third more time, the same numbers."""


class ModelOverride(Settings):
    """The fields of `model` that a stage may set for itself; what is absent comes from the recipe's `model`."""

    base: str | None = None
    revision: str | None = None
    quantization: Literal["none", "int8", "nf4"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    adapter: LoraSettings | Literal["none"] | None = None
    merge_parent: bool | None = None
    gradient_checkpointing: bool | None = cosmetic(None)


class Architecture(Settings):
    """A randomly initialised Llama for `pretrain`."""

    kind: Literal["llama"] = "llama"
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    """Key-value heads; as many as `heads` if absent."""
    max_positions: PositiveInt = 1024
    tie_embeddings: bool = True
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the random weights. A small model learns to copy from its prompt much sooner with 0.1."""


class TokenizerSettings(Settings):
    """A byte-level BPE tokenizer with ChatML markers, trained on the stage's own data and kept with its artifact."""

    vocab_size: PositiveInt = Field(default=1024, ge=270)
