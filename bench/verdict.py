"""What a run comes to: each technique beside its arithmetic, and the wanted ratios beside those that were found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.arms import ABLATIONS, PLAIN_ROWS, SMALL_PACKS

OF_ARITHMETIC = 0.85
"""Wanted share of the ratio that the operations promise."""
WANTED = (
    ("dpo-512-128", "trl default", 3.0),
    ("dpo-512-128", "trl tuned", 2.0),
    ("dpo-128-512", "trl tuned", 1.2),
    ("rrhf-k8-r4", PLAIN_ROWS, 2.0),
)
"""Case, arm beside it, how many times as many tokens per second."""

MEMORY = (
    ("ours", "trl tuned"),
    (SMALL_PACKS, "trl tuned"),
    ("ours", "trl default"),
    ("checkpointing", "trl default"),
)
"""Live memory of the first wanted below the second's. Like with like are the second line and the last."""


@dataclass(frozen=True)
class Gain:
    """One arm beside a faster one.

    Attributes:
        what: The technique, or the peer.
        slow: The arm without it.
        fast: The arm with it.
        measured: How many times as fast.
        promised: Ratio of their operations.
    """

    what: str
    slow: str
    fast: str
    measured: float
    promised: float

    @property
    def share(self) -> float:
        return self.measured / self.promised


@dataclass(frozen=True)
class Line:
    """Something wanted, and what was found: times as fast, or bytes of ours per byte of another's."""

    shape: str
    case: str
    what: str
    wanted: float
    found: float
    more_is_better: bool = True

    @property
    def reached(self) -> bool:
        return self.found >= self.wanted if self.more_is_better else self.found < self.wanted

    @property
    def words(self) -> str:
        """For a table."""
        if self.reached:
            return "reached"
        return f"missed: {self.found:.2f} where {self.wanted:.2f} is wanted"


def gains(arms: Mapping[str, Mapping[str, Any]], measured: Mapping[str, float]) -> list[Gain]:
    """Every technique that was switched off, and every peer.

    Args:
        arms: Name -> figures of an arm.
        measured: "slow / fast" -> how many times as fast.
    """
    pairs = [(a.technique, a.name, a.beside) for a in ABLATIONS if a.name in arms and a.beside in arms]
    named = {slow for _, slow, _ in pairs}
    pairs += [("everything", name, "ours") for name in arms if name not in ("ours", SMALL_PACKS, *named)]
    return [
        Gain(
            what, slow, fast, measured[f"{slow} / {fast}"], arms[slow]["flops"]["total"] / arms[fast]["flops"]["total"]
        )
        for what, slow, fast in pairs
    ]


def lines(cases: Sequence[Mapping[str, Any]]) -> list[Line]:
    """What is wanted of the cases that were timed; of memory and arithmetic the worst case of each shape."""
    found = list(_speeds(cases))
    for shape in dict.fromkeys(case["shape"] for case in cases):
        own = [case for case in cases if case["shape"] == shape]
        for ours, peer in MEMORY:
            shares = [
                (case["arms"][ours]["peak_bytes"] / case["arms"][peer]["peak_bytes"], case["case"])
                for case in own
                if ours in case["arms"] and peer in case["arms"]
            ]
            if shares:
                share, where = max(shares)
                found.append(Line(shape, where, f"live memory of {ours}, in that of {peer}", 1.0, share, False))
        for what, slow, fast in dict.fromkeys((g["what"], g["slow"], g["fast"]) for c in own for g in c["gains"]):
            same = [(g["share"], c["case"]) for c in own for g in c["gains"] if (g["slow"], g["fast"]) == (slow, fast)]
            share, where = min(same)
            found.append(
                Line(shape, where, f"{what}: {slow} to {fast}, of what the operations say", OF_ARITHMETIC, share)
            )
    return found


def _speeds(cases: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    for case in cases:
        for name, beside, wanted in WANTED:
            if name == case["case"] and beside in case["arms"]:
                found = case["ratios"][f"{beside} / ours"]
                yield Line(case["shape"], name, f"tokens/s of ours, in those of {beside}", wanted, found)
