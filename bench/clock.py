"""Times of several arms in one run, taken in turns, and the speed of a matrix product beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one arm, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Shortest and longest."""
        return min(self.seconds), max(self.seconds)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """One call, until the device is done."""
    _wait(device)
    began = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - began


def in_turns(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    """A B C A B C ...: what slows the machine down for a while slows every arm down.

    Args:
        arms: Name -> a function that runs the arm once and says how many seconds it took.
        rounds: How often each is run.
    """
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            taken[name].append(run())
    return {name: Times(tuple(values)) for name, values in taken.items()}


def ratio(slow: Times, fast: Times) -> float:
    """How many times as fast: the median over the rounds of the ratio within a round."""
    return statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def product_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product: what this device gives at best, here and now."""
    n = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(10))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
