"""Work in rounds that are kept one by one: what a killed or stopped run has finished is not done again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from align.artifacts.chunks import Chunks
from align.training import collectives
from align.training.guards import StopRequest

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked for a stop, and what was finished by then is kept."""


def in_rounds(
    todo: Sequence[T],
    size: int,
    do: Callable[[Sequence[T]], Mapping[str, Any]],
    *,
    chunks: Chunks,
    stop: StopRequest,
    tell: Callable[[int], None],
) -> None:
    """Do some work, shared among all ranks; each keeps what it has done after every round.

    Args:
        todo: The work, the same list on every rank.
        size: How much of it is one rank's part of a round.
        do: Does a part; its results by key. It is called in every round, with nothing where a rank has nothing left.
        chunks: Where results are kept.
        stop: Asked before every round.
        tell: Told how much of the work is done, by all ranks, after every round.

    Raises:
        Stopped: A rank was asked to stop.
    """
    rank, world = collectives.rank(), collectives.world_size()
    own, done = todo[rank::world], 0
    for number in range(math.ceil(math.ceil(len(todo) / world) / size)):
        # A signal reaches one rank, and none may wait for another that has left.
        if any(collectives.gather_objects(stop.received is not None)):
            raise Stopped
        part = own[number * size : (number + 1) * size]
        found = do(part)
        if found:
            chunks.add(found)
        done += sum(collectives.gather_objects(len(part)))
        tell(done)
