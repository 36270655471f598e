from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from align.artifacts.lock import locked
from align.errors import ArtifactError
from align.runner.folder import RunFolder, RunRecord, StageRecord
from align.runner.status import StageView, read_run
from align.runner.tables import status_table
from align.spec.job import Status
from tests.runner.test_launch import job


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that stands in its second stage."""
    work = tmp_path / "work"
    work.mkdir()
    status = Status(state="running", step=120, total_steps=400, message="training")
    (work / "status.json").write_text(status.model_dump_json())
    (work / "job.json").write_text(job(work).model_dump_json())
    made = RunFolder.of("demo", tmp_path)
    made.path.mkdir(parents=True)
    stages = {
        "base": StageRecord(fingerprint="a", state="reused", seconds=0.2),
        "sft": StageRecord(fingerprint="b", state="running", work=str(work)),
        "dpo": StageRecord(fingerprint="c"),
    }
    made.write_record(RunRecord(recipe="demo", path="demo.yaml", pid=1, started=0.0, stages=stages))
    return made


def test_a_run_under_way(folder: RunFolder) -> None:
    with folder.lock():
        assert read_run(folder) == [
            StageView("base", "reused", 0, 0, 0.2, ""),
            StageView("sft", "running", 120, 400, 0.0, ""),
            StageView("dpo", "waiting", 0, 0, 0.0, ""),
        ]


@pytest.mark.parametrize(
    ("engine", "again"),
    [
        ("align", "run it again to resume"),
        ("trl", "run it again; it starts from its beginning"),
        (None, "run it again"),
    ],
)
def test_a_run_whose_runner_is_gone_is_stopped(
    folder: RunFolder, tmp_path: Path, engine: str | None, again: str
) -> None:
    made = job(tmp_path / "work", settings={"kind": "sft", "data": "rows", "engine": engine})
    (tmp_path / "work" / "job.json").write_text(made.model_dump_json() if engine else "not the file of a job")
    assert read_run(folder)[1] == StageView("sft", "stopped", 120, 400, 0.0, again)


def test_a_worker_goes_on_without_its_runner(folder: RunFolder, tmp_path: Path) -> None:
    with locked(tmp_path / "work" / "worker.lock", "stage sft"):
        assert read_run(folder)[1] == StageView("sft", "running", 120, 400, 0.0, "training")


def test_nothing_has_run_here(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"this recipe has not run here\n  fix: align run"):
        read_run(RunFolder.of("demo", tmp_path))


def test_the_table(folder: RunFolder) -> None:
    console = Console(width=100)
    with console.capture() as text:
        console.print(status_table(read_run(folder)))
    rows = [line.split() for line in text.get().splitlines()]
    assert ["base", "reused", "0:00"] in rows
    assert ["sft", "stopped", "120/400", "run", "it", "again", "to", "resume"] in rows
