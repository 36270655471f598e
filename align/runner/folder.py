"""The folder of a recipe's runs: links to what every stage made, logs, and how far the run is."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from align.artifacts.lock import is_locked, locked
from align.artifacts.seal import write_atomic
from align.errors import LaunchError
from align.recipe import LoadedRecipe
from align.recipe.document import dump
from align.recipe.references import references
from align.spec.base import CodeRef, Settings

RUNS = "runs"
ROOTS = "roots"


class StageRecord(Settings):
    """One stage of a run as `status.json` tells it."""

    state: Literal["waiting", "running", "reused", "resumed", "done", "failed", "preempted"] = "waiting"
    fingerprint: str
    work: str = ""
    """Work folder of a stage that this run started; its own `status.json` tells the step."""
    seconds: float = 0.0
    resumed_from_step: int = 0
    message: str = ""


class RunRecord(Settings):
    """`status.json` of a run folder, replaced atomically by the runner."""

    recipe: str
    path: str
    pid: int
    started: float
    """Seconds since the epoch."""
    stages: dict[str, StageRecord] = Field(default_factory=dict)


class RunFolder:
    """`runs/<recipe>/`.

    Args:
        path: The folder; made when something is written to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, recipe: str, parent: Path | None = None) -> RunFolder:
        """The run folder of a recipe's name, under the current directory unless told otherwise."""
        return cls((parent or Path.cwd()) / RUNS / recipe)

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @property
    def log_folder(self) -> Path:
        return self.path / "logs"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run of the recipe out of this folder.

        Raises:
            LaunchError: Another process holds it (named by pid), or the folder cannot be written.
        """
        try:
            self.log_folder.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise LaunchError(
                f"cannot write here: {error.strerror}",
                where=str(self.path),
                fix="start align in a folder you can write to",
            ) from None
        with locked(self._lock, "this recipe"):
            yield

    def register(self, home: Path) -> None:
        """Leave a link to this folder in the store, so that `align gc` keeps what runs anywhere point to.

        Raises:
            LaunchError: The store cannot be written.
        """
        path = self.path.resolve()
        link = home / ROOTS / hashlib.sha256(str(path).encode()).hexdigest()[:16]
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                link.symlink_to(path)
        except OSError as error:
            raise LaunchError(
                f"cannot write to the store: {error.strerror}",
                where=str(home),
                fix="set ALIGN_HOME to a folder you can write to",
            ) from None

    def is_locked(self) -> bool:
        """Whether a run is going on here."""
        return is_locked(self._lock)

    def link(self, name: str, target: Path) -> None:
        """Point `<name>` at a folder, replacing an older link in one step."""
        self._link(self.path / name, target)

    def _link(self, path: Path, target: Path) -> None:
        temporary = _beside(path)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.resolve())
        temporary.replace(path)

    def links(self) -> dict[str, Path]:
        """Stage -> artifact folder, for links whose artifact is still there."""
        if not self.path.is_dir():
            return {}
        return {p.name: p.resolve() for p in sorted(self.path.iterdir()) if p.is_symlink() and p.is_dir()}

    def drop_links(self, keep: dict[str, Path]) -> None:
        """Remove every link that points elsewhere: it is of another state of the recipe."""
        for path in self.path.iterdir():
            if path.is_symlink() and path.resolve() != keep.get(path.name):
                path.unlink()

    def log(self, stage: str) -> Path:
        """Where a user finds the log of a stage."""
        return self.log_folder / f"{stage}.txt"

    def follow_log(self, stage: str, log: Path) -> None:
        """Show the log of a stage that is running."""
        self._link(self.log(stage), log)

    def keep_log(self, stage: str, log: Path) -> None:
        """Keep the log of a stage that has ended; where there is no room for a copy, the link to it stays."""
        temporary = _beside(self.log(stage))
        try:
            shutil.copyfile(log, temporary)
            temporary.replace(self.log(stage))
        except OSError:
            temporary.unlink(missing_ok=True)

    def write_recipe(self, loaded: LoadedRecipe) -> None:
        """Keep the recipe as it was understood: overrides and defaults filled in, `${env:...}` left as written.

        Relative paths are made absolute, so that the copy runs from where it lies.
        """
        write_atomic(self.path / "recipe.yaml", dump(resolved(loaded)))

    def write_record(self, record: RunRecord) -> None:
        write_atomic(self.path / "status.json", record.model_dump_json(indent=2))

    def read_record(self) -> RunRecord | None:
        """The last run here; None if there was none."""
        try:
            return RunRecord.model_validate_json((self.path / "status.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, to be renamed into place."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def resolved(loaded: LoadedRecipe) -> dict[str, Any]:
    """The recipe as plain data that `load_recipe` reads back from anywhere."""
    content = loaded.recipe.model_dump(mode="json", exclude_none=True)
    stages = content["stages"]
    places = [(content.get("model"), "base"), *((source, "path") for source in content["data"].values())]
    for name, stage in stages.items():
        # `reference: null` is an answer that has to be written.
        stage |= {
            f: None
            for f, info in type(loaded.stages[name]).model_fields.items()
            if info.is_required() and f not in stage
        }
        places += [(stage.get("model"), "base"), (stage.get("policy"), "adapter")]
        for reference in references(loaded.stages[name]):
            if isinstance(reference.mark, CodeRef):
                *around, last = reference.loc
                reduce(getitem, around, stage)[last] = str(loaded.folder / reference.name)
    for place, key in places:
        name = place.get(key) if isinstance(place, dict) else None
        if name is not None and name not in stages and (loaded.folder / name).exists():
            place[key] = str(loaded.folder / name)
    return content
