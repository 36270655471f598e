"""What inputs are made of: digests of files by content, of Hub names by commit, of plug-ins by version.

File digests are memoised in ``home/digests.json`` on path, size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that can change what it computes; others are never read."""

SETTLED_SECONDS = 2.0
"""A file changed more recently than this may change again within one tick of its clock: it is not memoised."""

HUB_TIMEOUT_SECONDS = 5.0

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Digests:
    """Digests of what lies outside a recipe.

    Args:
        home: Root of the store; the memo lives there.

    Attributes:
        unresolved: Hub names whose commit could not be found out, with the reason.
    """

    def __init__(self, home: Path) -> None:
        self.unresolved: dict[str, str] = {}
        self._memo_file = home / "digests.json"
        self._memo = _read_memo(self._memo_file)
        self._changed = False
        self._offline = ""
        self._commits: dict[tuple[str, str, str], str] = {}

    def file(self, path: Path) -> str:
        """SHA-256 of a file's content.

        Raises:
            OSError: It cannot be read.
        """
        status = path.stat()
        key, state = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        known = self._memo.get(key)
        if isinstance(known, list) and known[:2] == state:
            return str(known[2])
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - status.st_mtime > SETTLED_SECONDS:
            self._memo[key] = [*state, digest]
            self._changed = True
        return digest

    def folder(self, path: Path) -> str:
        """Digest of the model and tokenizer files of a folder, by name and content."""
        files = sorted(each for each in path.iterdir() if each.suffix in MODEL_FILES and each.is_file())
        return digest_of({each.name: self.file(each) for each in files})

    def hub(self, kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
        """``name@commit`` of a Hub repository; its branch stands for a commit that could not be found out.

        Raises:
            LookupError: The Hub answered that there is no such repository or revision.
        """
        return f"{name}@{self.revision(kind, name, revision)}"

    def revision(self, kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
        """The commit that a revision stands for: asked of the Hub once, else of the local cache.

        A name that neither knows keeps its branch and stays unresolved, so that a recipe can be checked without a
        network; a run that needs it cannot load it either.

        Raises:
            LookupError: The Hub answered that there is no such repository or revision.
        """
        revision = revision or "main"
        if _COMMIT.fullmatch(revision):
            return revision
        key = (kind, name, revision)
        if key not in self._commits:
            commit = None
            if not self._offline:
                commit, self._offline = _ask_hub(kind, name, revision)
            commit = commit or _cached_commit(kind, name, revision)
            if commit is None:
                self.unresolved[f"{name}@{revision}"] = self._offline
            self._commits[key] = commit or revision
        return self._commits[key]

    def save(self) -> None:
        """Write the memo; a home that cannot be written only costs time."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            self._memo_file.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self._memo_file.parent, prefix="digests-")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(self._memo, stream)
            Path(part).replace(self._memo_file)


def digest_of(value: Any) -> str:
    """SHA-256 of plain values: keys sorted, numbers by `repr`, no white space.

    Example:
        >>> digest_of({"b": 1e-4, "a": [1]}) == digest_of({"a": [1], "b": 0.0001})
        True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_memo(path: Path) -> dict[str, Any]:
    try:
        memo = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def _ask_hub(kind: Literal["model", "dataset"], name: str, revision: str) -> tuple[str | None, str]:
    """The commit and nothing; or None and why the Hub did not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        return ask(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha, ""
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise LookupError(str(error).strip().split("\n")[0]) from error
    except Exception as error:  # whatever its HTTP client raises where there is no network
        return None, str(error).strip().split("\n")[0] or type(error).__name__


def _cached_commit(kind: Literal["model", "dataset"], name: str, revision: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    refs = Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / revision
    try:
        return refs.read_text(encoding="utf-8").strip()
    except OSError:
        return None
