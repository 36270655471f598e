"""Guards that act before the weights change: non-finite numbers and requests to stop.

A signal or a bad number on one rank is agreed on by all ranks, so that none waits for another that has left.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor, nn

from align.errors import AlignError, TrainingError
from align.training import collectives

T = TypeVar("T")


class FiniteGradients:
    """Watches every gradient as autograd hands it over, before any engine reduces or steps it.

    It works alike under plain torch, DDP and ZeRO-1/2/3, whose averaged gradients live in different places.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._bad: Tensor | None = None
        self._handles = [p.register_hook(self._look) for p in parameters]

    def _look(self, gradient: Tensor) -> None:
        bad = ~torch.isfinite(gradient).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def pop(self) -> bool:
        """Whether a non-finite gradient was seen since the last call."""
        bad, self._bad = self._bad is not None and bool(self._bad), None
        return bad

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def refuse_non_finite(loss: Tensor, gradient: bool, rows: Sequence[int], step: int) -> None:
    """Stop all ranks before the optimizer steps, if any of them has seen a number that is not finite.

    Args:
        loss: This rank's loss.
        gradient: Whether one of its gradients is not finite.
        rows: Rows of the data in its batch.
        step: Optimizer steps taken so far.

    Raises:
        TrainingError: On every rank.
    """
    bad = not bool(torch.isfinite(loss))
    seen = collectives.gather_objects((bad, gradient, list(rows) if bad or gradient else []))
    if not any(b or g for b, g, _ in seen):
        return
    what = "loss" if any(b for b, *_ in seen) else "gradient"
    raise TrainingError(
        f"the {what} of step {step + 1} is not finite; the weights are those of step {step}. Rows of the data in this "
        f"batch: {[row for *_, batch in seen for row in batch]}",
        fix="lower learning_rate, look at these rows with `align data preview`, or use a wider dtype; "
        "the same command resumes from the last checkpoint",
    )


def together(do: Callable[[], T]) -> T:
    """What `do` gives on this rank, unless it fails on any: then every rank fails.

    Args:
        do: Work of one rank alone; no collective may be in it.

    Raises:
        AlignError: That of the first rank that had one; what else a rank raised is raised there, and told elsewhere.
    """
    error: Exception | None = None
    told: AlignError | None = None
    try:
        result = do()
    except AlignError as caught:
        error = told = caught
    except Exception as caught:  # whatever it is, the others must not wait for this rank
        error = caught
        told = TrainingError(f"rank {collectives.rank()} failed: {type(caught).__name__}: {caught}")
    seen = [each for each in collectives.gather_objects(told) if each is not None]
    if error is not None:
        raise error
    if seen:
        raise seen[0]
    return result


class Preempted(Exception):
    """A signal asked for a stop, and what was finished is kept; names the step of the last checkpoint, if any."""


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that is read at a step boundary."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
