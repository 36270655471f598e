"""The end of a stage: what is known of it as a manifest, and records with theirs as an artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.artifacts.manifest import Manifest, hardware, library_versions
from align.artifacts.store import Store
from align.data import DataReport
from align.recipe.made import RECORDS
from align.spec.job import Job
from align.stages.memory import peak_memory


def publish_records(
    job: Job,
    store: Store,
    rows: Iterable[Mapping[str, Any]],
    *,
    reports: Mapping[str, DataReport],
    metrics: Mapping[str, float],
    files: Mapping[str, Any] | None = None,
    seed: int | None = None,
    seconds: float,
) -> None:
    """Write the artifact of a stage that makes records.

    Args:
        job: The stage.
        store: Where the artifact goes.
        rows: The records, one by one.
        reports: Data name -> what was read, dropped and quarantined.
        metrics: What is told of the records.
        files: Further JSON files, by name.
        seed: Of draws.
        seconds: Wall time of the stage in this process.
    """
    folder = store.temporary(job.fingerprint)
    # Half of a surrogate pair, in a column that nobody looked at, is written as JSON escapes it.
    with (folder / RECORDS).open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    data = {name: report.model_dump(mode="json") for name, report in reports.items()}
    for name, content in {"data.json": data, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    store.add(manifest_of(job, data=data, metrics=metrics, seed=seed, seconds=seconds), folder)


def manifest_of(
    job: Job, *, data: Mapping[str, Any], metrics: Mapping[str, float], seed: int | None, seconds: float, **own: Any
) -> Manifest:
    """What a stage produced, on this machine, as of now.

    Args:
        job: The stage.
        data: Data name -> what was read, dropped and quarantined, as plain values.
        metrics: What is told of the result.
        seed: Of its draws.
        seconds: Wall time of the stage in this process.
        **own: Fields that only some kinds fill in.
    """
    return Manifest(
        kind=job.kind,
        stage=job.stage,
        recipe=job.recipe,
        fingerprint=job.fingerprint,
        inputs=job.inputs,
        data=dict(data),
        settings=job.settings,
        seed=seed,
        versions=library_versions(),
        hardware=hardware(),
        metrics=dict(metrics),
        wall_seconds=seconds,
        peak_memory_bytes=peak_memory(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **own,
    )


def quarantine_of(job: Job) -> Path:
    """Where malformed rows of a stage go."""
    return Path(job.work) / "quarantine.jsonl"
