"""Log-probabilities of trained tokens on disk: many small shards of rows, found by token ids.

A row is a completion behind its prompt. Whoever asks for the same tokens gets the same numbers: another method, another
order, another cut into training and validation. Which policy the numbers are of is the folder's business.

A shard is a safetensors file, named after the SHA-256 of its folder's name and its bytes, written aside and renamed.
R rows, N tokens in all: `keys` [R, 16] uint8, `lengths` [R] int32, `values` [N] fp32 in nats, row after row; `asked`
[16] uint8 tells the shards of one computation from those of others.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from align.artifacts.lock import locked
from align.artifacts.reference import LOCK, keep_complete
from align.artifacts.seal import write_atomic
from align.data.chat import Example
from align.logps.head import token_logps
from align.logps.pack import Pack

logger = logging.getLogger(__name__)

KEY_BYTES = 16
SHARD = "rows-{}.safetensors"
SHARD_DIGITS = 32

Row = np.ndarray[Any, np.dtype[np.float32]]
"""Log-probabilities of the trained tokens of a completion, in order, in nats."""


def row_keys(example: Example) -> tuple[bytes, ...]:
    """One key per completion: BLAKE2b of the prompt's ids, the completion's ids and which of these are trained."""
    prompt = hashlib.blake2b(digest_size=KEY_BYTES)
    _add(prompt, example.prompt_ids)
    keys = []
    for completion in example.completions:
        own = prompt.copy()
        _add(own, completion.ids)
        own.update(bytes(completion.mask))
        keys.append(own.digest())
    return tuple(keys)


def asked_for(keys: Iterable[bytes]) -> bytes:
    """One key of many rows, whatever their order."""
    return hashlib.blake2b(b"".join(sorted(keys)), digest_size=KEY_BYTES).digest()


def _add(seen: Any, ids: list[int]) -> None:
    """Ids behind their number, so that no other cut into prompt and completion has the same bytes."""
    seen.update(array("q", [len(ids), *ids]).tobytes())


@torch.no_grad()
def completion_token_logps(roles: Any, role: str, pack: Pack) -> list[Row]:
    """The trained tokens' log-probabilities of every completion of a pack, in the order of its completions.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
        role: Which of its roles computes.
        pack: Of any layout.
    """
    device = next(roles.parameters()).device
    values = roles(role, token_logps, pack.to(device)).float().cpu()
    # Tokens of a completion are neighbours, but layouts are free in the order of completions.
    values = values[torch.argsort(pack.owner, stable=True)]
    lengths = torch.bincount(pack.owner, minlength=pack.completions)[: pack.completions]
    return [row.numpy() for row in values[: int(lengths.sum())].split(lengths.tolist())]


class RowCache:
    """The rows of one policy. Any number of processes may read while one writes under the lock.

    Args:
        folder: As `ReferenceCaches.open` gives it. Reading makes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[str] = set()

    def lock(self, patience: float) -> AbstractContextManager[int]:
        """Keep other writers out; see `locked`."""
        return locked(self.folder / LOCK, "the same reference log-probs", patience)

    def rows(self, wanted: Container[bytes]) -> Iterator[tuple[bytes, Row, bytes]]:
        """The wanted rows of all shards that have come since the last call: key, values, and what was asked for then.

        A shard that is not what was written is told, removed and passed over.
        """
        for path in sorted(self.folder.glob(SHARD.format("*"))):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            for key, row, asked in self._shard(path):
                if key in wanted:
                    yield key, row, asked

    def add(self, rows: Mapping[bytes, Row], asked: bytes) -> None:
        """Write a shard. The caller holds the lock.

        Args:
            rows: What was computed.
            asked: `asked_for` all rows that the computation was for.

        Raises:
            ArtifactError: The disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content = safetensors.numpy.save(
            {
                "asked": np.frombuffer(asked, np.uint8),
                "keys": np.frombuffer(b"".join(rows), np.uint8).reshape(-1, KEY_BYTES),
                "lengths": np.array([len(row) for row in rows.values()], np.int32),
                "values": np.concatenate([np.zeros(0, np.float32), *rows.values()]),
            }
        )
        name = self._name(content)
        self._read.add(name)
        write_atomic(self.folder / name, content)

    def tidy(self) -> None:
        """Remove what killed writers left behind. The caller holds the lock."""
        for path in self.folder.glob("." + SHARD.format("*") + ".*"):
            path.unlink(missing_ok=True)

    def keep_complete(self, rows_id: str, rows: int) -> None:
        """Note that every row a stage asked for is there."""
        keep_complete(self.folder, rows_id, rows)

    def _name(self, content: bytes) -> str:
        seen = hashlib.sha256(self.folder.name.encode())
        seen.update(content)
        return SHARD.format(seen.hexdigest()[:SHARD_DIGITS])

    def _shard(self, path: Path) -> Iterator[tuple[bytes, Row, bytes]]:
        try:
            content = path.read_bytes()
            if self._name(content) != path.name:
                raise ValueError("its bytes are not those that were written")
            tensors = safetensors.numpy.load(content)
            keys, asked = tensors["keys"].tobytes(), tensors["asked"].tobytes()
            lengths, values = tensors["lengths"], tensors["values"]
        except FileNotFoundError:
            return  # collected a moment ago
        except (OSError, ValueError, KeyError, SafetensorError) as error:  # KeyError: of another version of align
            logger.warning("%s is damaged (%s); its rows are computed again", path, error)
            with suppress(OSError):
                path.unlink()
            return
        for i, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
            yield keys[i * KEY_BYTES : (i + 1) * KEY_BYTES], values[end - length : end], asked
