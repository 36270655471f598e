"""Reads a run folder as far as it goes: a page about half a run is better than none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align.artifacts.manifest import Manifest
from align.errors import ArtifactError
from align.recipe.made import RECORDS
from align.report.records import SHOWN

Json = dict[str, Any]


@dataclass(frozen=True)
class StageFiles:
    """What one stage left.

    Attributes:
        name: Its name in the recipe.
        kind: Its kind; empty where nothing tells.
        state: As the run's status has it; `done` or `waiting` where that is missing.
        message: The error of a stage that failed.
        settings: Its settings in the recipe.
        folder: Where its files are: the artifact, or the work folder of a stage that is not finished; None without any.
        manifest: What the artifact says of itself.
        metrics: Lines of `metrics.jsonl`.
        data: Content of `data.json`: data entry -> report.
        results: Content of `results.json` of a comparison.
        samples: Lines of `samples.jsonl` of a comparison.
        drawn: Lines of `samples.jsonl` of a stage that learns from its own completions.
        evaluation: Content of `evaluation.json` of a reward model.
        normalization: Content of its `normalization.json`.
        records: The first lines of `records.jsonl` of a stage that makes records.
        selection: Content of its `selection.json`, if it selects.
    """

    name: str
    kind: str = ""
    state: str = "waiting"
    message: str = ""
    settings: Json = field(default_factory=dict)
    folder: Path | None = None
    manifest: Manifest | None = None
    metrics: list[Json] = field(default_factory=list)
    data: Json = field(default_factory=dict)
    results: Json | None = None
    samples: list[Json] = field(default_factory=list)
    drawn: list[Json] = field(default_factory=list)
    evaluation: Json = field(default_factory=dict)
    normalization: Json = field(default_factory=dict)
    records: list[Json] = field(default_factory=list)
    selection: Json = field(default_factory=dict)


@dataclass(frozen=True)
class RunFiles:
    """A run folder: the recipe and its stages in the recipe's order."""

    name: str
    recipe: Json
    recipe_text: str
    stages: dict[str, StageFiles]


def read_run(folder: Path) -> RunFiles:
    """Read everything a run left in its folder; what is absent or damaged is left empty.

    Raises:
        ArtifactError: There is no such folder.
    """
    if not folder.is_dir():
        raise ArtifactError("there is no run here", where=str(folder), fix="run the recipe first: align run RECIPE")
    text = _text(folder / "recipe.yaml")
    recipe, status = _yaml(text), _json(folder / "status.json")
    settings, records = (_mapping(content.get("stages")) for content in (recipe, status))
    links = sorted(p.name for p in folder.iterdir() if (p / "manifest.json").is_file())
    names = dict.fromkeys([*settings, *records, *links])
    stages = {n: _stage(folder / n, n, _mapping(settings.get(n)), _mapping(records.get(n))) for n in names}
    return RunFiles(str(recipe.get("name") or folder.name), recipe, text, stages)


def _stage(folder: Path, name: str, settings: Json, record: Json) -> StageFiles:
    finished = (folder / "manifest.json").is_file()
    manifest = _manifest(folder / "manifest.json")
    work = Path(str(record.get("work", "")))
    # A stage that is under way, or failed, shows the curves it has so far.
    place = folder if finished else work if record.get("work") and work.is_dir() else None
    if place is None:
        state = str(record.get("state") or "waiting")
        return StageFiles(name, str(settings.get("kind", "")), state, str(record.get("message", "")), settings)
    results = _json(place / "results.json")
    return StageFiles(
        name=name,
        kind=str(settings.get("kind") or (manifest.kind if manifest else "")),
        state=str(record.get("state") or ("done" if finished else "waiting")),
        message=str(record.get("message", "")),
        settings=settings,
        folder=place,
        manifest=manifest,
        metrics=list(_lines(place / "metrics.jsonl")),
        data={name: report for name, report in _json(place / "data.json").items() if isinstance(report, dict)},
        results=results if isinstance(results.get("candidates"), dict) else None,
        samples=[line for line in _lines(place / "samples.jsonl") if isinstance(line.get("answers"), dict)],
        drawn=[line for line in _lines(place / "samples.jsonl") if isinstance(line.get("completion"), str)],
        evaluation=_json(place / "evaluation.json"),
        normalization=_json(place / "normalization.json"),
        records=list(islice(_lines(place / RECORDS), SHOWN)),
        selection=_json(place / "selection.json"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> Json:
    try:
        return _mapping(json.loads(_text(path)))
    except json.JSONDecodeError:
        return {}


def _yaml(text: str) -> Json:
    try:
        return _mapping(yaml.safe_load(text))
    except yaml.YAMLError:
        return {}


def _lines(path: Path) -> Iterator[Json]:
    """The objects of a JSONL file, one by one; a line that a kill cut short is passed over."""
    with suppress(OSError), path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


def _manifest(path: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json(_text(path))
    except ValidationError:
        return None
