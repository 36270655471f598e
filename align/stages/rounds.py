"""Work in rounds that are kept one by one: what a killed or stopped run has finished is not done again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from align.artifacts.chunks import Chunks
from align.training import collectives
from align.training.guards import Preempted, StopRequest

T = TypeVar("T")


def finished(chunks: Chunks) -> set[str]:
    """The keys of what is done already, the same on every rank."""
    return collectives.gather_objects(set(chunks.read()) if collectives.rank() == 0 else set())[0]


def in_rounds(
    work: Sequence[T],
    size: int,
    do: Callable[[Sequence[T]], Mapping[str, Any]],
    *,
    key: Callable[[T], str],
    there: set[str],
    chunks: Chunks,
    stop: StopRequest,
    tell: Callable[[int], None],
) -> None:
    """Do what is not done yet, one part after the other; ranks do several side by side.

    The parts are cut from the whole of the work, so that what is computed together, and with it every rounding, depends
    neither on the number of ranks nor on where a run was stopped.

    Args:
        work: All of it, the same list on every rank.
        size: How much of it is a part.
        do: Does a part; its results by key.
        key: What the result of a piece of work is kept under.
        there: The keys of what is done.
        chunks: Where results are kept.
        stop: Asked before every part.
        tell: Told how much has been done by all ranks.

    Raises:
        Preempted: A rank was asked to stop.
    """
    parts = [[each for each in work[i : i + size] if key(each) not in there] for i in range(0, len(work), size)]
    parts = [part for part in parts if part]
    rank, world, done = collectives.rank(), collectives.world_size(), 0
    for number in range(math.ceil(len(parts) / world)):
        # A signal reaches one rank, and none may wait for another that has left.
        if any(collectives.gather_objects(stop.received is not None)):
            raise Preempted
        own = parts[number * world + rank] if number * world + rank < len(parts) else []
        if own:
            chunks.add(do(own))
        done += sum(collectives.gather_objects(len(own)))
        tell(done)
