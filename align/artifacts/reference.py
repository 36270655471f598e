"""Reference log-probabilities of a store: one folder for every policy whose numbers were taken, found by its content.

`home/cache/reference/<key>/` holds

- `policy.json`: the key spelled out, and the artifacts that the policy is made of, each with the hash of its seal;
- `rows-<hash>.safetensors`: shards, written and read by `align.logps.cache`;
- `complete/<id>`: how many rows a stage asked for, once all of them were there; `align.recipe.reference` has the id.

Names of stages are in no key. A policy that was trained again under the same fingerprint has other bits, and so another
key; what was taken under the old one is dropped by `align gc`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pydantic import Field, ValidationError

from align.artifacts.seal import SEAL, folder_bytes, read_seal, verify_once, write_atomic
from align.errors import ArtifactError, LaunchError
from align.recipe.digest import MODEL_FILES, Digests, digest_of
from align.spec.base import Settings

ENGINE = 1
"""Raised when the same weights and tokens would give other log-probabilities: everything is computed anew."""

LIBRARIES = ("bitsandbytes", "peft", "torch", "transformers")
"""What computes them: another version may round otherwise, or mend a mistake."""

LOCK = ".lock"
POLICY = "policy.json"
COMPLETE = "complete"
KEY_DIGITS = 32


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


class PolicyKey(Settings):
    """Everything but the tokens that a log-probability depends on, by content."""

    engine: int = Field(default_factory=lambda: ENGINE)
    libraries: dict[str, str] = Field(default_factory=lambda: dict(_versions()))
    base: str
    """Digest of its weights and configuration, or its Hub name at a commit."""
    quantization: str
    dtype: str
    """What was really computed in, see `align.stages.reference.computed_in`."""
    adapter: str | None
    """Digest of its weights and configuration; None for the base alone."""
    tokenizer: str
    """Digest of its files, or its Hub name at a commit."""

    @property
    def current(self) -> bool:
        """Whether this engine and these libraries would compute the same."""
        return self.engine == ENGINE and self.libraries == _versions()

    @property
    def name(self) -> str:
        """Folder of the policy's rows."""
        return digest_of(self.model_dump())[:KEY_DIGITS]


class PolicyFile(Settings):
    """`policy.json`."""

    key: PolicyKey
    owners: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Fingerprint of a stage that made this policy -> name of every artifact it consists of -> hash of its seal."""


class ReferenceCaches:
    """All of them.

    Args:
        home: Root of the store.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "cache" / "reference"

    def open(self, key: PolicyKey, owner: str, artifacts: Mapping[str, Path]) -> Path:
        """The folder of a policy's rows, made if absent.

        Args:
            key: The policy.
            owner: Fingerprint of the stage whose policy it is.
            artifacts: Folders of the artifacts that the policy consists of, by name.

        Raises:
            ArtifactError: An artifact has no seal, or the disk is full.
            LaunchError: The store cannot be written.
        """
        folder = self.folder / key.name
        seals = {name: read_seal(path).sha256 for name, path in artifacts.items()}
        known = _read(folder)
        if known is None or known.owners.get(owner) != seals:
            owners = (known.owners if known else {}) | {owner: seals}
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / POLICY, PolicyFile(key=key, owners=owners).model_dump_json(indent=1))
            except OSError as error:
                raise LaunchError(
                    f"cannot write to {error.filename}: {error.strerror}",
                    fix="set ALIGN_HOME to a folder you can write to",
                ) from None
        return folder

    def complete(self, owner: str) -> dict[str, int]:
        """What was asked for of the policy of `owner` and is all there: `rows_id` -> number of rows.

        Nothing is verified: this is for a plan.
        """
        found: dict[str, int] = {}
        for folder in self.folders():
            policy = _read(folder)
            if policy is None or owner not in policy.owners or not policy.key.current:
                continue
            if self._intact(policy.owners[owner]):
                found |= dict(_complete(folder))
        return found

    def unneeded(self, needed: Callable[[str], bool]) -> Iterator[Path]:
        """Folders of policies that cannot be loaded any more: an artifact is gone, was made again, or is not needed.

        Args:
            needed: Whether an artifact of this name stays.
        """
        for folder in self.folders():
            policy = _read(folder)
            owners = policy.owners.values() if policy else ()
            if not any(all(map(needed, seals)) and self._intact(seals) for seals in owners):
                yield folder

    def folders(self) -> list[Path]:
        """The folder of every policy, half-removed ones too."""
        return sorted(p for p in self.folder.iterdir() if p.is_dir()) if self.folder.is_dir() else []

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return folder_bytes(self.folder)

    def _intact(self, seals: Mapping[str, str]) -> bool:
        """Whether these artifacts are there, with the content they had."""
        try:
            return all(read_seal(self.home / "artifacts" / name).sha256 == seal for name, seal in seals.items())
        except ArtifactError:
            return False


def keep_complete(folder: Path, rows_id: str, rows: int) -> None:
    """Note that every row a stage asked for is there."""
    (folder / COMPLETE).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / COMPLETE / rows_id, str(rows))


def remove_cache(folder: Path) -> None:
    """Delete the rows of a policy; the caller holds the lock. `policy.json` goes first: nothing counts without it."""
    (folder / POLICY).unlink(missing_ok=True)
    shutil.rmtree(folder)


def weights_digest(folder: Path, digests: Digests) -> str:
    """Digest of the weights and the configuration in a model or adapter folder, by name and content."""
    return digest_of({name: sha for name, sha in _files(folder, digests).items() if not _of_tokenizer(name)})


def tokenizer_digest(folder: Path, digests: Digests) -> str:
    """Digest of the other files of a model folder: vocabulary, special tokens, chat template."""
    return digest_of({name: sha for name, sha in _files(folder, digests).items() if _of_tokenizer(name)})


def _files(folder: Path, digests: Digests) -> dict[str, str]:
    """SHA-256 of every file that can change what a model computes: as sealed, if it is part of an artifact."""
    if (folder.parent / SEAL).is_file():
        verify_once(folder.parent)
        sealed = {Path(name): record.sha256 for name, record in read_seal(folder.parent).files.items()}
        return {
            path.name: sha
            for path, sha in sealed.items()
            if path.parent == Path(folder.name) and path.suffix in MODEL_FILES
        }
    return {path.name: digests.file(path) for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES}


def _of_tokenizer(name: str) -> bool:
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    return not weights and name not in ("config.json", "generation_config.json", "adapter_config.json")


def _read(folder: Path) -> PolicyFile | None:
    try:
        return PolicyFile.model_validate_json((folder / POLICY).read_bytes())
    except (OSError, ValidationError):
        return None


def _complete(folder: Path) -> Iterator[tuple[str, int]]:
    for path in (folder / COMPLETE).iterdir() if (folder / COMPLETE).is_dir() else ():
        with suppress(OSError, ValueError):
            yield path.name, int(path.read_text())
