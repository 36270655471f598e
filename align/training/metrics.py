"""`metrics.jsonl`: one JSON object per logged step, with no step twice after a resume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLLOUT = '"rollout/number"'
"""In the line of a rollout."""


class MetricsFile:
    """The file; written by rank 0 alone.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Add what was logged at `line["step"]`."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again, and a last line that was cut off.

        A rollout is told before the first step that learns from it, so one at `step` is told again.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() and step else []
        kept = [line + "\n" for line in lines if _step(line) + (ROLLOUT in line) <= step]
        self.path.write_text("".join(kept), encoding="utf-8")


@dataclass
class LeftOut:
    """Updates that were left out since the last line.

    Attributes:
        count: How many.
        since: The step of that line.
    """

    count: int = 0
    since: int = 0

    def correct(self, logs: dict[str, float], step: int) -> None:
        """They have no loss: the mean is that of the others, and there is none if there are none.

        Args:
            logs: The line of `step`, whose `loss` counts them as 0.
            step: The present step.
        """
        steps, taken = step - self.since, step - self.since - self.count
        if self.count:
            logs["update/left_out"] = self.count / steps
            if taken:
                logs["loss"] *= steps / taken
            else:
                del logs["loss"]
                logs.pop("grad_norm", None)
        self.count, self.since = 0, step


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
