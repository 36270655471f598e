"""What of a stage depends on the machine it runs on: nothing that makes its result."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch

from align.spec.stages import Stage, TrainedStage
from align.spec.train import PACK_TOKENS

S = TypeVar("S", bound=Stage)


def device() -> Literal["cpu", "cuda"]:
    """Where stages run here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fitted(stage: S) -> S:
    """The stage with the pack budget that suits this machine, where the recipe does not say one.

    A large pack keeps a GPU busy. A CPU is busy with a small one, which takes less memory.
    """
    if not isinstance(stage, TrainedStage) or "pack_tokens" in stage.train.model_fields_set:
        return stage
    train = stage.train.model_copy(update={"pack_tokens": PACK_TOKENS[device()]})
    return stage.model_copy(update={"train": train})
