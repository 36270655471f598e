"""Records that a stage makes, as the entry of `data` that other stages read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from align.spec.data import FileData
from align.spec.records import RecordsStage
from align.spec.stages import Stage

RECORDS = "records.jsonl"
"""The records, in the artifact of the stage that makes them."""
NAME_DIGITS = 16
"""Digits of a fingerprint that its artifact is called by."""


def artifact_folder(home: Path, fingerprint: str) -> Path:
    """Where the artifact of a fingerprint is, or will be.

    Args:
        home: Root of the store.
        fingerprint: Or what it begins with.
    """
    return home / "artifacts" / fingerprint[:NAME_DIGITS]


def makers(stages: Mapping[str, Stage]) -> dict[str, RecordsStage]:
    """The stages that make records."""
    return {name: stage for name, stage in stages.items() if isinstance(stage, RecordsStage)}


def records_file(fingerprint: str, home: Path) -> Path:
    """The records of a stage, whether it has run or not."""
    return artifact_folder(home, fingerprint) / RECORDS


def records_made(stage: RecordsStage, fingerprint: str, home: Path) -> FileData:
    """What a stage makes as a data entry; its file is there once the stage has run.

    Args:
        stage: It.
        fingerprint: Its fingerprint.
        home: Root of the store.
    """
    return FileData(path=str(records_file(fingerprint, home)), format=stage.makes)
