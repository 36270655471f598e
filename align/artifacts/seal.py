"""Folders that are whole or absent: hashed, fsynced, renamed into place, and checked byte for byte before use.

A sealed folder holds `seal.json` with the SHA-256 and size of every other file. Verifying reads every byte, at the
speed of the disk or of SHA-256 (1 to 2 GB/s on one core): seconds for a model of 7B, once per process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from align.artifacts.manifest import FileRecord
from align.errors import ArtifactError
from align.spec.base import Settings

SEAL = "seal.json"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Seal(Settings):
    """`seal.json`: what the folder held when it was sealed."""

    schema_version: Literal[1] = 1
    files: dict[str, FileRecord]
    """Path in the folder, with `/`, -> hash and size."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """What the writer wants to be found with the folder."""
    sha256: str = ""
    """Hash of the seal's own content."""

    def digest(self) -> str:
        """What `sha256` has to be."""
        content = json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def seal(folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write `seal.json` and force the folder to the disk: every file, every folder.

    Args:
        folder: A folder of regular files, complete.
        extra: JSON values to keep in the seal.

    Raises:
        ArtifactError: It holds a link or a special file, or the disk is full.
    """
    with told_when_full(folder):
        files = {name: _record(path, sync=True) for name, path, _ in _files(folder)}
        for path in {parent for name in files for parent in Path(name).parents}:
            _sync_folder(folder / path)
        content = Seal(files=files, extra=extra or {})
        content.sha256 = content.digest()
        write_atomic(folder / SEAL, content.model_dump_json(indent=1))


def read_seal(folder: Path) -> Seal:
    """The seal, itself intact; the files are not looked at.

    Raises:
        ArtifactError: There is none, or it is damaged.
    """
    try:
        found = Seal.model_validate_json((folder / SEAL).read_bytes())
    except FileNotFoundError:
        what = f"{SEAL} is missing: the folder was never finished" if folder.is_dir() else "there is no such folder"
        raise ArtifactError(what, where=str(folder)) from None
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{SEAL} cannot be read: {_story(error)}", where=str(folder)) from None
    if found.sha256 != found.digest():
        raise ArtifactError(f"{SEAL} is damaged: its text is not what was written", where=str(folder))
    return found


def verify(folder: Path) -> None:
    """Check that the folder holds exactly the bytes it was sealed with.

    Raises:
        ArtifactError: Naming the file that is damaged, missing or extra.
    """
    expected = read_seal(folder).files
    found = {name: (path, state.st_size) for name, path, state in _files(folder)}
    for name in sorted(expected.keys() - found.keys()):
        raise ArtifactError(f"{name} is missing", where=str(folder))
    for name in sorted(found.keys() - expected.keys()):
        raise ArtifactError(f"{name} does not belong here: it was not sealed with the rest", where=str(folder))
    for name, (_, size) in found.items():
        if size != expected[name].bytes:
            raise ArtifactError(f"{name} has {size} bytes and should have {expected[name].bytes}", where=str(folder))
    for name, (path, _) in found.items():
        if _record(path) != expected[name]:
            raise ArtifactError(f"{name} is damaged: its bytes are not those that were written", where=str(folder))


State = tuple[tuple[str, int, int, int], ...]
"""Path, inode, size and time of every file of a folder: what changes when somebody writes to it."""

_verified: dict[Path, State] = {}
"""Folders this process has verified, and their state at that time."""


def verify_once(folder: Path) -> None:
    """`verify`, unless this process did it before and the folder's state is still the same."""
    state = _state(folder)
    if _verified.get(folder) != state:
        verify(folder)
        _verified[folder] = state


def publish(temporary: Path, final: Path, extra: dict[str, Any] | None = None) -> None:
    """Seal a filled folder and move it to its place in one step.

    Args:
        temporary: The filled folder, on the same file system as `final`. It is gone afterwards.
        final: Where it is to be. A folder that is there already and does not verify is replaced.
        extra: JSON values to keep in the seal.

    Raises:
        ArtifactError: A good folder is there already, the disk is full, or the two lie on different file systems.
    """
    seal(temporary, extra)
    with told_when_full(final.parent):
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise ArtifactError(f"{temporary} is on another file system than {final}") from None
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            _replace(temporary, final)
        _sync_folder(final.parent)
    _verified[final] = _state(final)  # these bytes were hashed a moment ago


def _replace(temporary: Path, final: Path) -> None:
    try:
        verify(final)
    except ArtifactError:
        aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside)
    else:
        raise ArtifactError("there is a verified folder of this name already", where=str(final))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file (text as UTF-8) so that a reader, or a crash at any moment, sees the old or the new one whole.

    Raises:
        ArtifactError: The disk is full; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with told_when_full(path, needed=len(data)):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def told_when_full(path: Path, needed: int | None = None) -> Iterator[None]:
    """Tell a full disk as an ArtifactError with the place and the sizes.

    Args:
        path: What is written.
        needed: Bytes it takes. For a folder half written, what it holds already is told instead.

    Raises:
        ArtifactError: The block ran out of space, also inside a library that has no errno to show for it.
    """
    try:
        yield
    except Exception as error:
        if not (getattr(error, "errno", None) in FULL or "No space left on device" in str(error)):
            raise
        if needed is None:
            needed = folder_bytes(path)
        free = shutil.disk_usage(path if path.is_dir() else path.parent).free
        raise ArtifactError(
            f"no space left on the disk: at least {needed} bytes are needed, {free} are free",
            where=str(path),
            fix="free some space (`align gc`), or set ALIGN_HOME to a larger disk; the same command resumes",
        ) from error


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder; 0 if there is none."""
    if not folder.is_dir():
        return 0
    paths = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in paths if not path.is_symlink())


def _files(folder: Path, *, seal: bool = False) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Every file under a folder, its seal apart, sorted: path in it, path, state.

    Raises:
        ArtifactError: Something is neither a regular file nor a folder (links are not followed), or cannot be read.
    """
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders.sort()
            links = (name for name in folders if (Path(parent) / name).is_symlink())
            for path in (Path(parent) / name for name in sorted([*names, *links])):
                name, state = path.relative_to(folder).as_posix(), path.lstat()
                if not stat.S_ISREG(state.st_mode):
                    raise ArtifactError(f"{name} is a link or a special file", where=str(folder))
                if seal or name != SEAL:
                    yield name, path, state
    except OSError as error:
        raise ArtifactError(f"{error.filename} cannot be read: {error.strerror}", where=str(folder)) from None


def _state(folder: Path) -> State:
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, _, s in _files(folder, seal=True))


def _raise(error: OSError) -> None:
    raise error


def _record(path: Path, *, sync: bool = False) -> FileRecord:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            if sync:
                os.fsync(file.fileno())
            return FileRecord(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=file.tell())
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ArtifactError(f"{path.name} cannot be read: {_story(error)}", where=str(path.parent)) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _story(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}"
    return getattr(error, "strerror", None) or str(error)
