"""The only file that knows PEFT's LoRA layers: make them, fill them, switch them, name their tensors.

PEFT's own `set_adapter` and `disable_adapter` also change which parameters are trainable. Here switching touches the
two attributes that a layer's forward reads, and nothing else.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from align.errors import RecipeError
from align.models.heads import SCORE
from align.models.platform import prepare_bitsandbytes
from align.models.source import reading
from align.spec.model import LoraSettings

prepare_bitsandbytes()  # PEFT has imported it by now; whoever loads a 4-bit model afterwards shall not meet the repack

WEIGHTS = "adapter_model.safetensors"
DISK_PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor on disk."""


def lora_config(settings: LoraSettings) -> LoraConfig:
    """The recipe's adapter settings in PEFT's words."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def read_adapter(
    source: str | Path, revision: str | None = None, *, with_head: bool = False
) -> tuple[LoraConfig, dict[str, Tensor], Tensor | None]:
    """Configuration and tensors of a PEFT folder or Hub adapter; plain LoRA in safetensors only.

    Args:
        source: Folder or Hub name.
        revision: Hub revision.
        with_head: Whether the adapter may be a reward model's, with a scalar head of its own.

    Returns:
        Configuration, tensors of the layers, and the weight of the scalar head if there is one.

    Raises:
        RecipeError: If it is no such adapter.
        LaunchError: If the Hub cannot be reached.
    """
    where = "stages.<stage>.policy.adapter"
    with reading(source, "LoRA adapter", where=where):
        config = PeftConfig.from_pretrained(str(source), revision=revision)
        weights = load_file(cached_file(str(source), WEIGHTS, revision=revision))
    score = None
    if config.task_type == "SEQ_CLS" and set(config.modules_to_save or ()) <= {SCORE, "classifier"}:
        if not with_head:
            raise RecipeError(
                f"{source} is the adapter of a reward model or classifier, not of a policy",
                where=where,
                fix="name an adapter of task_type CAUSAL_LM",
            )
        score = weights.pop(f"{DISK_PREFIX}{SCORE}.weight", None)
        config.modules_to_save, config.task_type = None, "CAUSAL_LM"  # the head is ours, not PEFT's
    extra = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    if not isinstance(config, LoraConfig) or extra or config.bias != "none":
        raise RecipeError(
            f"{source} is not a plain LoRA adapter ({', '.join(extra) or config.peft_type})",
            where=where,
            fix="merge it into its base and use the result as model.base",
        )
    return config, weights, score


def inject(base: PreTrainedModel, key: str, config: LoraConfig) -> None:
    """Add an adapter of fp32 zeros and noise to the layers that `config` names, leaving the global random state alone.

    Raises:
        RecipeError: If a target names no layer of the model.
    """
    _check_targets(base, config)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, base, adapter_name=key)
    for parameter in adapter_tensors(base, key).values():
        parameter.data = parameter.data.float()


def initialise(tensors: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Fill A with Kaiming-uniform noise from `seed` alone and B with zeros, so that the adapter starts as the identity.

    *Source*: the default of PEFT and of the LoRA paper's code.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors:
        if "lora_A" in name:
            noise = torch.empty(tensor.shape)
            nn.init.kaiming_uniform_(noise, a=math.sqrt(5), generator=generator)
            tensor.data.copy_(noise)
        else:
            tensor.data.zero_()


def fill(tensors: dict[str, Tensor], values: dict[str, Tensor], what: str) -> None:
    """Copy `values` into an adapter's tensors.

    Raises:
        RecipeError: If names or shapes differ: another rank, or other targets.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    given = {name: tuple(t.shape) for name, t in values.items()}
    if shapes != given:
        name = min(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise mismatch(f"{what} has {_told(given.get(name))} for {name}, the stage wants {_told(shapes.get(name))}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def check_scaling(wanted: LoraConfig, found: LoraConfig, what: str) -> None:
    """An adapter that is continued keeps its scale, or its function would change before the first step.

    Raises:
        RecipeError: If rank, alpha or rslora differ.
    """
    for field, name in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rslora")):
        if getattr(wanted, field) != getattr(found, field):
            raise mismatch(f"{what} has {name} {getattr(found, field)}, the stage wants {getattr(wanted, field)}")


def mismatch(message: str) -> RecipeError:
    """The error of an adapter that cannot be continued."""
    return RecipeError(
        message, where="model.adapter", fix="use the parent's adapter settings, or set model.merge_parent: true"
    )


def layers(base: nn.Module) -> list[LoraLayer]:
    """Every layer that holds adapters, in module order."""
    return [module for module in base.modules() if isinstance(module, LoraLayer)]


def activate(lora_layers: Sequence[LoraLayer], key: str | None) -> None:
    """Make the forward of every layer use one adapter, or none. Changes no requires_grad flag."""
    for layer in lora_layers:
        layer._disable_adapters = key is None
        layer._active_adapter = [] if key is None else [key]


def adapter_tensors(base: nn.Module, key: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters under the names PEFT gives them on disk, in module order."""
    part = f".{key}."
    return {
        DISK_PREFIX + name.replace(part, "."): parameter
        for name, parameter in base.named_parameters()
        if part in name and ".lora_" in name
    }


def without_dropout(base: nn.Module, key: str) -> None:
    """A frozen adapter computes the same whatever mode the model is in."""
    for layer in layers(base):
        if key in layer.lora_dropout:
            layer.lora_dropout[key] = nn.Identity()


def _check_targets(base: nn.Module, config: LoraConfig) -> None:
    """PEFT ignores a target that names nothing as long as another one matches."""
    if isinstance(config.target_modules, str):  # all-linear, or a pattern that somebody's own adapter brought along
        return
    names = [name.replace(".base_layer", "") for name, _ in base.named_modules()]
    for target in config.target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            found = sorted({re.split(r"\.", n)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear)})
            raise RecipeError(
                f"the model has no module {target!r}",
                where="model.adapter.targets",
                fix=f"use all-linear, or some of {', '.join(found)}",
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {list(shape)}"
