"""How a stage is optimised and how it is launched."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from align.spec.base import Settings, Unread, cosmetic

PACK_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Budget of a pack where a recipe says none."""


class ValidationSettings(Settings):
    """Loss on held-out examples during training."""

    fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of the examples that is held out, chosen by `seed`; whole prompts, so that none is on both sides."""
    every_steps: PositiveInt = 50
    keep: Literal["last", "best"] = "last"
    """Which weights the stage ends with: the last, or those of the lowest validation loss."""
    patience: PositiveInt | None = None
    """Stop after this many validations without improvement."""


class TrainSettings(Settings):
    """One run of the optimizer. Units are in the names."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "warmup_ratio",
            lambda train: train.lr_scheduler == "constant" and train.warmup_ratio > 0,
            "a constant learning rate has no warm-up",
            "remove it, or write lr_scheduler: linear or cosine",
        ),
    )

    epochs: PositiveFloat | None = None
    """Passes over the data; 1 if neither `epochs` nor `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of `epochs`."""
    global_batch_size: PositiveInt = 16
    """Examples per optimizer step, over all ranks."""
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    max_grad_norm: PositiveFloat = 1.0
    max_tokens: PositiveInt = 1024
    """Longest prompt + completion. A longer completion is cut and loses its EOS; a record whose prompt leaves no room
    for a completion is dropped and counted."""
    seed: NonNegativeInt = 0
    validation: ValidationSettings | None = None
    pack_tokens: PositiveInt = cosmetic(PACK_TOKENS["cuda"])
    """Token budget of one forward pass; changes memory and speed, not the result. Without a GPU the default is 1024."""
    packing: Literal["auto", "rows", "flat", "shared"] = cosmetic("auto")
    """How sequences are laid out in a pack: in padded rows, one after the other, or with the prompt of an example once
    for all its completions. auto shares prompts where the model can and no dropout is drawn. The loss is the same."""
    log_every_steps: PositiveInt = cosmetic(10)
    save_every_steps: PositiveInt = cosmetic(100)
    """Checkpoint interval."""
    keep_checkpoints: PositiveInt = cosmetic(2)

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give `epochs` or `max_steps`, not both")
        return self


class LaunchSettings(Settings):
    """Processes of a training stage on this machine. Never part of a fingerprint."""

    processes: PositiveInt = 1
    deepspeed: Literal["none", "zero1", "zero2", "zero3"] = "none"


class LoggingSettings(Settings):
    """What is told while a recipe runs. Never part of a fingerprint."""

    report_to: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    """Trackers to send the metrics to; their own variables (`WANDB_*`) configure them."""
