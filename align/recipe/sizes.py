"""The size of a model from what is written about it: an architecture, or the headers of safetensors files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.recipe.rope import rope_parameters, text_config
from align.spec.model import Architecture, LoraSettings, ModelSettings

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a 4-bit weight with double quantization: a byte of scale per 64 weights, a float per 256 scales.

*Source*: arXiv:2305.14314, section 3; 4.127 bits.
"""

NOT_LINEAR = re.compile(r"embed|\bwte\b|\bwpe\b|lm_head|^output\b|^score\b")
"""Names of matrices that are looked up in or are the head: never quantised, and left alone by `all-linear`."""

MAX_HEADER_BYTES = 100 * 2**20
"""Limit of the safetensors format."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory.

    Attributes:
        linears: Every linear layer of the blocks by module name: (out, in) features.
        others: Parameters of everything else: embeddings, head, norms, biases.
        hidden: Width of the residual stream.
        layers: Blocks.
        vocabulary: Tokens.
        positions: Longest sequence it was made for, where that is known.
    """

    linears: dict[str, tuple[int, int]]
    others: int
    hidden: int
    layers: int
    vocabulary: int
    positions: int | None = None

    @cached_property
    def linear_parameters(self) -> int:
        return sum(out * into for out, into in self.linears.values())

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.others

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward part."""
        return max((max(shape) for shape in self.linears.values()), default=self.hidden)

    @property
    def keys(self) -> int:
        """Width of a layer's keys, as of its values."""
        return next((out for name, (out, _) in self.linears.items() if name.endswith("k_proj")), self.hidden)

    def adapter_parameters(self, lora: LoraSettings) -> int:
        """Parameters of a LoRA adapter: rank x (in + out) for each layer it targets."""
        targets = lora.targets
        return sum(
            lora.rank * (out + into)
            for name, (out, into) in self.linears.items()
            if targets == "all-linear" or any(name == each or name.endswith(f".{each}") for each in targets)
        )

    def frozen_bytes(self, quantization: str, compute_bytes: int) -> int:
        """Bytes of the base as it is loaded: linear layers quantised, everything else in the compute dtype."""
        others = self.others * compute_bytes
        if quantization == "nf4":
            return math.ceil(self.linear_parameters * NF4_BITS / 8) + others
        if quantization == "int8":
            scales = sum(4 * out for out, _ in self.linears.values())
            return self.linear_parameters + scales + others
        return self.parameters * compute_bytes


def size_of_architecture(architecture: Architecture, vocabulary: int) -> ModelSize:
    """The exact size of a new Llama.

    Example:
        >>> seven = Architecture(
        ...     hidden_size=4096, intermediate_size=11008, layers=32, heads=32, tie_embeddings=False
        ... )
        >>> f"{size_of_architecture(seven, 32000).parameters:,}"
        '6,738,415,616'
    """
    h, wide = architecture.hidden_size, architecture.intermediate_size
    keys = h // architecture.heads * (architecture.kv_heads or architecture.heads)
    block = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (keys, h),
        "self_attn.v_proj": (keys, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (wide, h),
        "mlp.up_proj": (wide, h),
        "mlp.down_proj": (h, wide),
    }
    n = architecture.layers
    linears = {f"model.layers.{i}.{name}": shape for i in range(n) for name, shape in block.items()}
    embeddings = vocabulary * h * (1 if architecture.tie_embeddings else 2)
    norms = (2 * n + 1) * h
    return ModelSize(linears, embeddings + norms, h, n, vocabulary, architecture.max_positions)


def size_of_folder(folder: Path) -> ModelSize | None:
    """The size of a saved model, from its configuration and the headers of its weights; None if they do not tell.

    A folder that was saved in quantised form does not: its tensors are packed.
    """
    config = config_of_folder(folder)
    try:
        shapes = {name: shape for path in _weight_files(folder) for name, shape in _header(path).items()}
    except (OSError, ValueError):
        return None
    if not shapes or not config or "quantization_config" in config:
        return None
    text = text_config(config)
    linears, others = {}, 0
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight") and not NOT_LINEAR.search(name):
            linears[name.removesuffix(".weight")] = (shape[0], shape[1])
        else:
            others += math.prod(shape)
    embedding = next((shape for name, shape in shapes.items() if len(shape) == 2 and NOT_LINEAR.search(name)), None)
    if embedding is None:
        return None
    blocks = {found[1] for name in linears if (found := re.search(r"\.(\d+)\.", name))}
    return ModelSize(
        linears,
        others,
        hidden=int(text.get("hidden_size") or embedding[1]),
        layers=len(blocks),
        vocabulary=int(text.get("vocab_size") or embedding[0]),
        positions=positions_of(config),
    )


def config_of_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a saved model; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def positions_of(config: dict[str, Any]) -> int | None:
    """Longest sequence that a model was made for; None if its configuration does not tell."""
    text = text_config(config)
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    if not isinstance(positions, int):
        return None
    longest = positions
    for each in rope_parameters(text):
        factor = each.get("factor")
        if isinstance(factor, int | float):
            longest = max(longest, int(factor * (each.get("original_max_position_embeddings") or positions)))
    return longest


def cached_folder(model: ModelSettings) -> Path | None:
    """The folder of a Hub model in the local cache; None if it was never downloaded. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, in its order of preference."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [folder / Path(name).name for name in sorted(set(names.values()))]


def _header(path: Path) -> dict[str, list[int]]:
    """Tensor name -> shape. *Source*: the safetensors format, 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: each["shape"] for name, each in header.items() if name != "__metadata__"}
