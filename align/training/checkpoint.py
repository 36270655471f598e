"""Checkpoints: whole or absent, and only resumed from when they verify."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from align.artifacts.seal import publish, read_seal, verify
from align.errors import ArtifactError, TrainingError

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


def publish_checkpoint(staged: Path, folder: Path, step: int, launch: dict[str, int], keep: int | None = None) -> None:
    """Seal a staged checkpoint together with its launch, rename it into place, drop the oldest beyond `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    publish(staged, folder / f"step-{step:06d}", {"launch": launch})
    if keep is not None:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def drop_bests(folder: Path, kept: Path, current: int | None) -> None:
    """Drop weights of validations that are no longer the best, not even for a run that resumes from a checkpoint.

    A run that resumes does not have to reach the later ones again: rounding may differ.

    Args:
        folder: The weights, by their step.
        kept: The checkpoints.
        current: Step of the best validation so far.
    """
    named = {current, *(_best_of(checkpoint) for checkpoint in checkpoints(kept))}
    for best in checkpoints(folder):
        if step_of(best) not in named:
            shutil.rmtree(best)


def _best_of(checkpoint: Path) -> int | None:
    """The step of the best validation before a checkpoint; None if there was none or the state cannot be read."""
    try:
        best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_global_step"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: nobody resumes from it
        return None
    return best if isinstance(best, int) else None


def forget_after(folder: Path, step: int) -> None:
    """Drop what was published after a step that is resumed from: it will be made again."""
    for later in checkpoints(folder):
        if step_of(later) > step:
            shutil.rmtree(later)


def check_launch(checkpoint: Path, launch: dict[str, int]) -> None:
    """Refuse to resume where the optimizer's state is laid out otherwise.

    Without DeepSpeed every rank holds the whole state, so their number may change.

    Raises:
        TrainingError: Another ZeRO stage, or under ZeRO another number of processes.
    """
    made = read_seal(checkpoint).extra.get("launch", launch)
    if made["zero"] == launch["zero"] and (not launch["zero"] or made["processes"] == launch["processes"]):
        return
    told = [f"{each['processes']} processes with {_zero(each['zero'])}" for each in (made, launch)]
    raise TrainingError(
        f"{checkpoint.name} was made by {told[0]} and cannot be continued by {told[1]}",
        where="launch",
        fix="set launch as it was until the stage is finished, or start the stage again with --from STAGE",
    )


def _zero(stage: int) -> str:
    return f"ZeRO-{stage}" if stage else "no DeepSpeed"


def gather_trainable(roles: Any) -> dict[str, Tensor]:
    """The trained tensors of a `RoleModel`, whole, on the CPU. Under ZeRO-3 every rank has to call it."""
    with _whole(roles):
        return {name: t.detach().cpu().clone().contiguous() for name, t in roles.trainable_state().items()}


def put_trainable(roles: Any, state: dict[str, Tensor]) -> None:
    """Put what `gather_trainable` gave into the model itself; a launcher's optimizer and fp32 copies stay as they were.

    Every rank has to call it, with the same tensors.
    """
    with _whole(roles, modifier_rank=0):
        roles.load_trainable_state(state)


def _whole(roles: Any, modifier_rank: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """The trained parameters of a `RoleModel` in one piece, also where ZeRO-3 took them apart."""
    parameters = [p for p in roles.parameters() if p.requires_grad]
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def write_trainable(state: dict[str, Tensor], folder: Path) -> None:
    """Write what `gather_trainable` gave, as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def read_trainable(folder: Path) -> dict[str, Tensor]:
    """Read what `write_trainable` wrote."""
    return load_file(folder / WEIGHTS)
