"""Rollouts in the work folder of a stage: what was drawn is not drawn again, unless the weights are others by now.

A rollout stays until every checkpoint is beyond it, so that a run which goes on from any of them finds what it needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.artifacts.seal import publish, read_seal, verify, write_atomic
from align.errors import ArtifactError
from align.training import collectives
from align.training.buffer import Buffer

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
SHOWN = 2
"""Completions of a rollout that are shown."""


class KeptRollouts:
    """The rollouts that a run has made, and those of runs before it; written by rank 0.

    Args:
        work: Folder of the unfinished stage.
        tokenizer: Makes text of what is shown.
    """

    def __init__(self, work: Path, tokenizer: Any) -> None:
        self.work, self.tokenizer = work, tokenizer

    def find(self, number: int, weights: str) -> Buffer | None:
        """A rollout that was made with these very weights; all ranks together.

        One of other weights, or a damaged one, is dropped: a resumed run may come to a step with weights that differ
        by rounding, and what others have drawn is not this policy's own.

        Args:
            number: Which, from 0.
            weights: What `digest_of` says of the trained tensors.
        """
        found: Path | None = None
        if collectives.rank() == 0 and (folder := self._folder(number)).is_dir():
            try:
                verify(folder)
                found = folder if read_seal(folder).extra.get("weights") == weights else None
                if found is None:
                    logger.info("rollout %d was drawn by other weights and is drawn again", number + 1)
            except ArtifactError as error:
                logger.warning("rollout %d is damaged and is drawn again: %s", number + 1, error)
            if found is None:
                shutil.rmtree(folder)
        found = collectives.gather_objects(found)[0]
        return None if found is None else Buffer.read(found)

    def keep(self, buffer: Buffer, weights: str) -> None:
        """Write a rollout, whole or not at all; all ranks together."""
        if collectives.rank() == 0:
            staged = self.work / "staging" / "rollout"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            buffer.write(staged)
            final = self._folder(buffer.number)
            final.parent.mkdir(exist_ok=True)
            publish(staged, final, {"weights": weights})
        collectives.barrier()

    def drop_before(self, number: int) -> None:
        """Drop the rollouts that no run can come to any more; on rank 0."""
        for folder in (self.work / "rollouts").glob("rollout-*"):
            if int(folder.name.removeprefix("rollout-")) < number:
                shutil.rmtree(folder)

    def show(self, buffer: Buffer) -> None:
        """Add its first completions to `samples.jsonl`, to look at while the stage runs; on rank 0."""
        path = self.work / SAMPLES
        # Not `splitlines`: a completion may hold other characters that it takes for ends of lines.
        before = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        lines = [line for line in before if json.loads(line)["rollout"] < buffer.number]
        for c, ids in enumerate(buffer.completions[:SHOWN]):
            asked = buffer.prompts[int(buffer.rollout.prompt[c])]
            line = {
                "rollout": buffer.number,
                "step": buffer.step,
                "prompt": self.tokenizer.decode(asked, skip_special_tokens=True),
                "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                "score": float(buffer.rollout.scores[c]),
            }
            lines.append(json.dumps(line, ensure_ascii=False))
        write_atomic(path, "".join(line + "\n" for line in lines))

    def _folder(self, number: int) -> Path:
        return self.work / "rollouts" / f"rollout-{number:06d}"


def digest_of(trained: Iterable[Tensor]) -> str:
    """Tells weights apart: a hash of every trained tensor; all ranks together.

    Ranks that hold the same say the same, so their number does not enter. Under ZeRO-3 each holds its own part.
    """
    own = hashlib.sha256()
    for tensor in trained:
        held = getattr(tensor, "ds_tensor", tensor).detach().cpu().contiguous()
        own.update(held.flatten().view(torch.uint8).numpy().data)
    seen = dict.fromkeys(collectives.gather_objects(own.hexdigest()))
    return hashlib.sha256(" ".join(seen).encode()).hexdigest()
