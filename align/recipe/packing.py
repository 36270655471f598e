"""How the sequences of a stage are laid out and which attention computes them: one rule, for the plan and the engine.

It reads a model's configuration as `config.json` has it and asks nobody else, so the plan can tell without a model. The
engine takes what the rule says for granted only where it is a no: a yes is proven on the model before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from align.recipe.rope import text_config

Packing = Literal["rows", "flat", "shared"]
"""Padded rows, one row without padding, or that with the prompt of an example once for all its completions."""

Attention = Literal["model", "blocks", "ragged"]
"""The model's own function, or a kernel of `align/logps/attention.py` that knows the segments of a row."""

LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
"""Where a configuration lists what its layers are."""

ORDINARY = {"full_attention", "attention", "global"}
"""Names of layers in which every token sees all before it."""

RECURRENT = {"state_size", "ssm_state_size", "mamba_d_state", "lru_width", "linear_conv_kernel_dim", "conv_L_cache"}
"""Settings of layers that carry a state from token to token."""

STATEFUL = {"rwkv", "xlstm"}
"""Recurrent models whose configurations have none of the settings above."""

BIASED = {"bloom", "mpt"}
"""Models that add positions to their attention scores (ALiBi)."""

DEAF = {"codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "nemotron", "openai-gpt", "stablelm", "xglm"}
"""Models whose layers call no attention function of ours, or hand it no segments, as of transformers 5.23."""

WINDOW_UNLESS_SAID = {"mistral": 4096}
"""The window that transformers gives a model whose configuration does not mention one."""

WINDOW_IF_SAID = ("qwen2", "qwen3")
"""Families in which a window has to be switched on by `use_sliding_window`."""

SINGLE = ("tokens", "unpaired")
"""Batch kinds with one completion to train per example."""

DROPOUT = "adapters have dropout, which draws anew for every copy of a token"


@dataclass(frozen=True)
class PackingChoice:
    """How log-probabilities are computed.

    Attributes:
        packing: How sequences are laid out.
        attention: What computes attention.
        why: Why prompts are not shared, where they are not and the recipe did not ask for that.
    """

    packing: Packing
    attention: Attention
    why: str = ""

    def of_batch(self, batch: str) -> PackingChoice:
        """What it comes to for a batch kind: where an example has one completion, there is no prompt to share."""
        alone = self.packing == "shared" and batch in SINGLE
        return replace(self, packing="flat") if alone else self

    def __str__(self) -> str:
        attention = "" if self.attention == "model" else f", attention {self.attention}"
        return f"{self.packing}{attention}" + (f": {self.why}" if self.why else "")


def choose(
    config: Mapping[str, Any], *, dropout: bool, wanted: Literal["auto", "rows", "flat", "shared"], kernel: Attention
) -> PackingChoice:
    """The packing that a model gets, as far as its configuration tells.

    A prompt is shared by its completions where the model can (ordinary attention in every layer). Dropout draws anew
    for every copy of a token, so with dropout each completion has its own copy of the prompt, still without padding.
    Models with other layers get padded rows, which any model computes.

    Args:
        config: A model's configuration.
        dropout: Whether adapters draw dropout.
        wanted: What the recipe asks for; `auto` is the rule above.
        kernel: What computes attention where rows are not padded, see `kernel_for`.

    Example:
        >>> print(choose({"model_type": "llama"}, dropout=False, wanted="auto", kernel="blocks"))
        shared, attention blocks
        >>> print(choose({"sliding_window": 4096}, dropout=False, wanted="auto", kernel="blocks"))
        rows: its attention slides over a window of 4096 tokens
    """
    if wanted == "rows":
        return PackingChoice("rows", "model")
    reason = why_not_flat(config)
    if reason is not None:
        return padded(reason)
    if wanted == "flat":
        return PackingChoice("flat", kernel)
    return PackingChoice("flat", kernel, DROPOUT) if dropout else PackingChoice("shared", kernel)


def padded(why: str) -> PackingChoice:
    """Padded rows, for a reason."""
    return PackingChoice("rows", "model", why)


TRL = padded("TRL lays out its batches itself")
"""What a stage with `engine: trl` gets."""


def kernel_for(device: str, *, half: bool) -> Attention:
    """The kernel for a kind of device and a precision; on a GPU that computes it wrongly, blocks take its place."""
    return "ragged" if device == "cuda" and half else "blocks"


def why_not_flat(config: Mapping[str, Any]) -> str | None:
    """Why a model cannot compute several sequences in one row; None if it can as far as its configuration tells.

    A configuration that was written by an older transformers may leave its layers unlisted; settings that go with such
    layers give them away then.

    Example:
        >>> why_not_flat({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 512})
        'it has layers of type sliding_attention'
        >>> why_not_flat({"model_type": "qwen2", "sliding_window": 131072})
    """
    text = text_config(dict(config))
    kind = str(text.get("model_type", ""))
    if kind in DEAF:
        return f"layers of {kind} models cannot be told which tokens belong together"
    if kind in BIASED or text.get("alibi"):
        return "its positions are added to its attention scores (ALiBi)"
    if kind in STATEFUL:
        return "it has recurrent layers"
    if text.get("attn_logit_softcapping"):
        return "its attention scores are capped"
    layers = next((listed for name in LAYER_LISTS if isinstance(listed := text.get(name), list) and listed), None)
    if layers is not None:
        others = sorted({str(layer) for layer in layers} - ORDINARY)
        return f"it has layers of type {', '.join(others)}" if others else None
    if any(text.get(name) for name in RECURRENT):
        return "it has recurrent layers"
    if text.get("attention_chunk_size"):
        return f"its attention is cut into chunks of {text['attention_chunk_size']} tokens"
    window = _window(text, kind)
    return f"its attention slides over a window of {window} tokens" if window else None


def _window(text: Mapping[str, Any], kind: str) -> int | None:
    """The window of layers that are not listed; None if all of them see everything."""
    window = text.get("sliding_window", WINDOW_UNLESS_SAID.get(kind))
    used = text.get("use_sliding_window", not kind.startswith(WINDOW_IF_SAID))
    first, layers = text.get("max_window_layers"), text.get("num_hidden_layers")
    if isinstance(first, int) and isinstance(layers, int) and first >= layers:
        return None
    return window if window and used else None
