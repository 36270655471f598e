"""How far the last run of a recipe is, from the files that runner and workers keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from align.artifacts.lock import is_locked
from align.errors import ArtifactError
from align.runner.folder import RunFolder, StageRecord
from align.runner.launch import RESUME, WORKER_LOCK, again_of, read_status
from align.spec.job import Job, Status


@dataclass(frozen=True)
class StageView:
    """One stage as `align status` shows it.

    Attributes:
        state: As in `status.json`, and `stopped`: it was running and its runner is gone.
        step: Steps done, 0 where it does not count any.
        total_steps: Steps in all, 0 where unknown.
        seconds: Wall time in the last run.
        message: What it is doing, or why it ended.
    """

    name: str
    state: str
    step: int
    total_steps: int
    seconds: float
    message: str


def read_run(folder: RunFolder) -> list[StageView]:
    """Every stage of the last run in this folder, in order.

    Raises:
        ArtifactError: Nothing has run here.
    """
    record = folder.read_record()
    if record is None:
        raise ArtifactError("this recipe has not run here", where=str(folder.path), fix="align run RECIPE")
    alive = folder.is_locked()
    return [_view(name, stage, alive) for name, stage in record.stages.items()]


def _view(name: str, stage: StageRecord, alive: bool) -> StageView:
    state, message = stage.state, stage.message
    worker = read_status(Path(stage.work)) if stage.work else None
    if stage.work and is_locked(Path(stage.work) / WORKER_LOCK):
        state, message = "running", worker.message if worker else ""  # also where its runner is gone
    elif state == "running" and not alive:
        return StageView(name, "stopped", *_steps(worker), stage.seconds, _again(Path(stage.work)))
    return StageView(name, state, *_steps(worker), stage.seconds, message)


def _again(work: Path) -> str:
    """What running it again does."""
    try:
        job = Job.model_validate_json((work / "job.json").read_bytes())
    except (OSError, ValidationError):
        return "run it again"
    return "run it again to resume" if again_of(job) == RESUME else "run it again; it starts from its beginning"


def _steps(worker: Status | None) -> tuple[int, int]:
    return (worker.step, worker.total_steps) if worker else (0, 0)
