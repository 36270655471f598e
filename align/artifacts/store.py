"""The store: artifacts by fingerprint, work folders of unfinished stages, locks and garbage collection.

Under its home, NAME standing for the first 16 digits of a fingerprint:

- `artifacts/NAME/` is sealed; a folder whose name starts with a dot is still being written.
- `work/NAME/` has checkpoints, log and lock of a stage that is not finished.
- `cache/reference/` has reference log-probabilities by policy, see `align.artifacts.reference`.
- `damaged/` has what did not verify, for a look until the next collection.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from align.artifacts.chunks import count_chunks
from align.artifacts.lock import is_locked, locked
from align.artifacts.manifest import Manifest
from align.artifacts.reference import LOCK as CACHE_LOCK
from align.artifacts.reference import ReferenceCaches, remove_cache
from align.artifacts.seal import SEAL, folder_bytes, publish, read_seal, verify_once, write_atomic
from align.errors import ArtifactError, LaunchError
from align.recipe.made import NAME_DIGITS, artifact_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK = "stage.lock"

What = Literal["artifact", "work", "temporary", "reference", "damaged"]
PARENTS: dict[What, str] = {"artifact": "artifacts", "work": "work", "damaged": "damaged"}


@dataclass(frozen=True)
class Artifact:
    """A verified artifact.

    Attributes:
        folder: Where it lies.
        manifest: What it is, with the hash and size of every file.
    """

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Removed:
    """Something that garbage collection removed (or would, in a dry run)."""

    path: Path
    bytes: int
    what: What


class Store:
    """Artifacts on disk. Making one touches nothing; folders appear when something is written.

    Args:
        home: Its root; ALIGN_HOME or `~/.align` if absent.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = Path(home or os.environ.get("ALIGN_HOME") or "~/.align").expanduser().absolute()
        self.references = ReferenceCaches(self.home)

    def find(self, fingerprint: str) -> Artifact | None:
        """The artifact, verified, or None.

        A damaged one is moved to `home/damaged` with a warning and counts as absent, so that its stage is made again.

        Raises:
            ArtifactError: It is damaged and cannot be moved.
        """
        folder = self.folder(fingerprint)
        if not folder.is_dir():
            return None
        try:
            return _open(folder, fingerprint)
        except ArtifactError as error:
            logger.warning("artifact is damaged, moved aside and made again: %s", error)
            self._set_aside(folder, error)
            return None

    def get(self, fingerprint: str) -> Artifact:
        """The artifact, verified.

        Raises:
            ArtifactError: It is absent or damaged.
        """
        folder = self.folder(fingerprint)
        try:
            if not folder.is_dir():
                raise ArtifactError("there is no such artifact", where=str(folder))
            return _open(folder, fingerprint)
        except ArtifactError as error:
            raise ArtifactError(
                error.message, where=error.where, fix="run the recipe again: what is missing or damaged is made again"
            ) from None

    def work(self, fingerprint: str) -> Path:
        """Folder of the unfinished stage, made if absent."""
        return _made(self.home / "work" / _name(fingerprint))

    def resumes_at(self, fingerprint: str) -> int | None:
        """Where an unfinished stage goes on; None if it begins.

        The step of its newest sealed checkpoint, which is not verified, or how many values its finished parts have.
        """
        work = self.home / "work" / _name(fingerprint)
        steps = [int(path.parent.name.removeprefix("step-")) for path in work.glob(f"checkpoints/step-*/{SEAL}")]
        return max(steps, default=count_chunks(work) or None)

    def temporary(self, fingerprint: str) -> Path:
        """A new empty folder on the file system of the artifacts, to be filled and handed to `add`."""
        return _made(self.home / "artifacts" / f".{_name(fingerprint)}.{uuid.uuid4().hex}")

    def add(self, manifest: Manifest, temporary: Path) -> Artifact:
        """Seal a filled folder and put it in its place. The temporary folder is gone afterwards, whatever happens.

        Where another process was faster with the same fingerprint, its artifact is kept and returned.

        Raises:
            ArtifactError: The disk is full, or the folder holds a link or a special file.
        """
        final = self.folder(manifest.fingerprint)
        try:
            write_atomic(temporary / MANIFEST, manifest.model_dump_json(indent=1))
            publish(temporary, final)
        except ArtifactError:
            existing = self.find(manifest.fingerprint)
            if existing is None:
                raise
            return existing
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self.get(manifest.fingerprint)

    def discard(self, fingerprint: str) -> None:
        """Remove the artifact and all that its unfinished stage kept. The caller holds the lock."""
        _remove(self.folder(fingerprint))
        work = self.home / "work" / _name(fingerprint)
        for path in list(work.iterdir()) if work.is_dir() else []:
            if path.is_dir() and not path.is_symlink():
                _remove(path)
            elif path.suffix != ".lock":
                path.unlink()

    @contextmanager
    def lock(self, fingerprint: str, stage: str = "") -> Iterator[None]:
        """Keep other processes from making this artifact too.

        Args:
            fingerprint: Of the stage.
            stage: Its name, for the message that others get.

        Raises:
            LaunchError: Another process has the lock; its pid is told.
        """
        with locked(self.work(fingerprint) / LOCK, f"stage {stage}" if stage else "this stage"):
            yield

    def collect(self, keep: set[str], *, references: bool = False, dry_run: bool = False) -> list[Removed]:
        """Remove what is neither kept nor in use.

        Kept are the artifacts and unfinished stages of these fingerprints and of every stage that is locked now, the
        inputs of locked stages, the bases that kept adapters stand on, and reference log-probabilities of policies that
        are kept.

        Args:
            keep: Fingerprints, or artifact names (their first 16 digits).
            references: Remove the reference log-probabilities of kept policies too.
            dry_run: Only tell.
        """
        busy = {folder.name for folder in self._folders("work") if _is_busy(folder)}
        needed = {_name(each) for each in keep} | busy
        needed |= {name for each in busy for name in _inputs(self.home / "work" / each)}
        needed |= {base for name in needed for base in self._bases(name)}
        removed = []
        for what, parent in PARENTS.items():
            for folder in self._folders(parent):
                name, leftover = folder.name.lstrip(".").split(".")[0], folder.name.startswith(".")
                if what == "damaged" or name not in (busy if leftover else needed):
                    removed += self._collected(folder, "temporary" if leftover else what, name, dry_run)
        caches = self.references.folders() if references else self.references.unneeded(needed.__contains__)
        return [*removed, *(each for folder in caches for each in self._collected_cache(folder, dry_run))]

    def _collected(self, folder: Path, what: What, name: str, dry_run: bool) -> list[Removed]:
        """Remove one folder under the lock of its stage; nothing if somebody took that in the meantime."""
        removed = Removed(folder, folder_bytes(folder), what)
        if dry_run:
            return [removed]
        if what == "damaged":
            shutil.rmtree(folder)
            return [removed]
        fresh = not (self.home / "work" / name).exists()
        try:
            with locked(self.work(name) / LOCK, "garbage collection"):
                _remove(folder)
                if fresh:
                    _remove(self.home / "work" / name)
        except LaunchError:
            return []
        return [removed]

    def _collected_cache(self, folder: Path, dry_run: bool) -> list[Removed]:
        """Remove the rows of one policy, unless somebody is adding to them."""
        removed = Removed(folder, folder_bytes(folder), "reference")
        if not dry_run:
            try:
                with locked(folder / CACHE_LOCK, "garbage collection"):
                    remove_cache(folder)
            except LaunchError:
                return []
        return [removed]

    def _bases(self, name: str) -> Iterator[str]:
        """Names of the artifacts that this one cannot be loaded without."""
        try:
            manifest = Manifest.model_validate_json((self.home / "artifacts" / name / MANIFEST).read_bytes())
        except (OSError, ValidationError):
            return
        model = manifest.trained
        if model is not None and model.base_kind == "stage" and model.adapter:
            yield _name(model.base)

    def _folders(self, kind: str) -> list[Path]:
        parent = self.home / kind
        return sorted(p for p in parent.iterdir() if p.is_dir() and not p.is_symlink()) if parent.is_dir() else []

    def folder(self, fingerprint: str) -> Path:
        """Where the artifact of a fingerprint is, or will be."""
        return artifact_folder(self.home, _name(fingerprint))

    def _set_aside(self, folder: Path, why: ArtifactError) -> None:
        try:
            aside = _made(self.home / "damaged") / f"{folder.name}-{uuid.uuid4().hex[:8]}"
            folder.rename(aside)
        except FileNotFoundError:
            return  # another process moved it
        except (OSError, LaunchError):
            raise ArtifactError(
                f"{why.message}; it cannot be moved aside",
                where=why.where,
                fix="delete this folder, then run again",
            ) from None


def _open(folder: Path, fingerprint: str) -> Artifact:
    verify_once(folder)
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{MANIFEST} is not one of this version of align: {error}", where=str(folder)) from None
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(f"{MANIFEST} tells another fingerprint, {manifest.fingerprint}", where=str(folder))
    manifest.files = read_seal(folder).files
    return Artifact(folder, manifest)


def _name(fingerprint: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_-]+", fingerprint):
        raise ArtifactError(f"{fingerprint!r} is not a fingerprint")
    return fingerprint[:NAME_DIGITS]


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"cannot write to {error.filename}: {error.strerror}", fix="set ALIGN_HOME to a folder you can write to"
        ) from None
    return folder


def _remove(folder: Path) -> None:
    """Delete a folder so that a crash on the way leaves nothing that looks like it."""
    if folder.is_dir():
        gone = folder.with_name(f".{folder.name.lstrip('.')}.{uuid.uuid4().hex}")
        folder.rename(gone)
        shutil.rmtree(gone)


def _is_busy(work: Path) -> bool:
    """Whether a runner works on it, or a worker whose runner was killed."""
    return any(is_locked(path) for path in work.glob("*.lock"))


def _inputs(work: Path) -> Iterator[str]:
    """Names of the artifacts that an unfinished stage reads."""
    try:
        inputs = json.loads((work / "job.json").read_text()).get("inputs", {})
    except (OSError, ValueError):
        return
    for fingerprint in inputs.values():
        yield _name(fingerprint)
