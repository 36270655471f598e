"""What a worker process is told: one file with everything resolved, and the status file it answers with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from align.spec.base import Settings
from align.spec.data import DataSource
from align.spec.model import ModelSettings
from align.spec.train import LaunchSettings, LoggingSettings


class Job(Settings):
    """One stage, resolved. Secrets stay `${env:NAME}` and are looked up in the worker."""

    recipe: str
    stage: str
    kind: str
    settings: dict[str, Any]
    """The stage's settings with defaults filled in; parsed again by its kind's class."""
    model: ModelSettings | None = None
    """The recipe's model with the stage's overrides applied; None for kinds that load none."""
    fingerprint: str
    inputs: dict[str, str] = Field(default_factory=dict)
    """Stage name -> fingerprint of its artifact, for every stage this one names, its base included."""
    data: dict[str, DataSource] = Field(default_factory=dict)
    """The entries of the recipe's `data` that this stage names, and the records of stages that it names."""
    code: dict[str, str] = Field(default_factory=dict)
    """Functions of the user's that this stage may run, as the recipe names them -> SHA-256 of their file."""
    folder: str
    """Folder of the recipe; relative data paths start here."""
    work: str
    """Folder of the unfinished stage: checkpoints, log, metrics, status."""
    home: str
    """Root of the store (`ALIGN_HOME`)."""
    launch: LaunchSettings = LaunchSettings()
    logging: LoggingSettings = LoggingSettings()


class Status(Settings):
    """`status.json` of a work folder, replaced atomically by rank 0 of the worker."""

    state: Literal["starting", "running", "done", "failed", "preempted"]
    step: NonNegativeInt = 0
    total_steps: NonNegativeInt = 0
    resumed_from_step: NonNegativeInt = 0
    message: str = ""
    """The error, told as to a user, when `state` is failed."""
    warnings: list[str] = Field(default_factory=list)
    """What a user should know while the stage runs; each is shown once."""
    exit_code: int | None = None
    """The worker's own exit code: launchers turn every failure into 1."""
    pid: int = 0
