"""Finished parts of a stage that makes records, in its work folder: a run that was killed goes on behind them."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.artifacts.seal import write_atomic

FOLDER = "chunks"


class Chunks:
    """Parts of one stage; several processes may add to them.

    Args:
        work: The stage's work folder.
    """

    def __init__(self, work: Path) -> None:
        self.folder = work / FOLDER

    def read(self) -> dict[str, Any]:
        """What is there: key -> value."""
        lines = (line for path in sorted(self.folder.glob("*.jsonl")) for line in path.read_bytes().splitlines())
        return dict(json.loads(line) for line in lines)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values under their keys, all of them or none.

        Raises:
            ArtifactError: The disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # The name begins with how many there are, so that they can be counted without being read.
        path = self.folder / f"{len(values):06d}-{uuid.uuid4().hex}.jsonl"
        write_atomic(path, "".join(json.dumps(each) + "\n" for each in values.items()))

    def drop(self) -> None:
        """Forget everything: the stage's artifact has it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def count_chunks(work: Path) -> int:
    """How many values there are in a work folder, which need not exist."""
    return sum(int(path.name.partition("-")[0]) for path in (work / FOLDER).glob("*.jsonl"))
