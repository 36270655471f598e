"""Checkpoints: whole or absent, and only resumed from when they verify."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from align.artifacts.seal import publish, verify
from align.errors import ArtifactError

logger = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"


def step_of(checkpoint: Path) -> int:
    """The optimizer step a published checkpoint was taken after."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; they may still be damaged."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=step_of)


def latest_verified(folder: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; damaged ones are told and passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except ArtifactError as error:
            logger.warning("checkpoint %s is damaged and is passed over: %s", checkpoint.name, error)
            continue
        return checkpoint
    return None


def publish_checkpoint(staged: Path, folder: Path, step: int, keep: int, pinned: int | None) -> None:
    """Seal a staged checkpoint, rename it into place, and drop the oldest beyond `keep` (never the pinned step)."""
    folder.mkdir(parents=True, exist_ok=True)
    publish(staged, folder / f"step-{step:06d}")
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) != pinned:
            shutil.rmtree(old)


def gather_trainable(roles: Any) -> dict[str, Tensor]:
    """The trained tensors of a `RoleModel`, whole, on the CPU. Under ZeRO-3 every rank has to call it."""
    parameters = [p for p in roles.parameters() if p.requires_grad]
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        context = deepspeed.zero.GatheredParameters(parameters)
    with context:
        return {name: t.detach().cpu().clone().contiguous() for name, t in roles.trainable_state().items()}


def write_trainable(state: dict[str, Tensor], folder: Path) -> None:
    """Write what `gather_trainable` gave, as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def read_trainable(folder: Path) -> dict[str, Tensor]:
    """Read what `write_trainable` wrote."""
    return load_file(folder / WEIGHTS)
