"""Which candidates are kept, and which are set against each other: indices from texts and scores.

A pair is (the better one, the worse one), and never of equal scores. Where an order decides, the earlier of equals
comes first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

from align.data.edits import levenshtein
from align.data.equations import equations, is_true

Pairs = list[tuple[int, int]]


def rft(texts: Sequence[str], correct: Sequence[bool]) -> list[int]:
    """Solutions of one question that rejection-sampling fine-tuning keeps: right ones that calculate differently.

    A solution is right if its answer is and every equation it shows is true. Of those with the same list of equations
    one is kept: the first, until a later one is farther, in total Levenshtein distance, from all others kept by then.
    A solution without equations has the empty list, so at most one such is kept.

    *Source*: arXiv:2308.01825, section 3.3 and its published code, which compares equations by Python's `eval`.

    Args:
        texts: The candidates, in the order in which they were drawn.
        correct: Whether the answer of each is right.

    Returns:
        Indices, ascending.
    """

    @cache
    def apart(i: int, j: int) -> int:
        return levenshtein(texts[i], texts[j])

    kept: dict[tuple[str, ...], int] = {}
    for i, (text, right) in enumerate(zip(texts, correct, strict=True)):
        own = tuple(equations(text))
        if not right or not all(map(is_true, own)):
            continue
        rival = kept.setdefault(own, i)
        if text != texts[rival]:
            others = [k for k in kept.values() if k != rival]
            if sum(apart(i, k) for k in others) > sum(apart(rival, k) for k in others):
                kept[own] = i
    return sorted(kept.values())


def ranked(scores: Sequence[float]) -> list[int]:
    """All candidates, best first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def best_of(scores: Sequence[float], n: int) -> list[int]:
    """The `n` best candidates, best first; all of them if there are fewer."""
    return ranked(scores)[:n]


def top_fraction(scores: Sequence[float], fraction: float) -> list[int]:
    """The best `fraction` of a whole set, rounded down but never to none, in the order of the set.

    Example:
        >>> top_fraction([0.1, 0.9, 0.5, 0.7], 0.5)
        [1, 3]
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction {fraction} is not in (0, 1]")
    # 0.29 * 100 is 28.999999999999996 in binary, and 29 to whoever wrote it.
    count = max(1, math.floor(fraction * len(scores) + 1e-9))
    return sorted(best_of(scores, count))


def above(scores: Sequence[float], threshold: float) -> list[int]:
    """Candidates that reach the threshold: of answers scored 0 or 1, a threshold of 1 keeps the right ones."""
    return [i for i, score in enumerate(scores) if score >= threshold]


def best_vs_worst(scores: Sequence[float]) -> Pairs:
    """The best against the worst: one pair, or none where all are equal."""
    order = ranked(scores)
    return _strict(scores, [(order[0], order[-1])] if order else [])


def all_pairs(scores: Sequence[float]) -> Pairs:
    """Every two candidates of which one is better."""
    return _strict(scores, list(combinations(ranked(scores), 2)))


def adjacent(scores: Sequence[float]) -> Pairs:
    """Every two that follow one another when sorted, best first."""
    return _strict(scores, list(pairwise(ranked(scores))))


def random_pairs(scores: Sequence[float], n: int, seed: int) -> Pairs:
    """`n` different pairs drawn from all of them, or all where there are fewer; the same ones for the same seed."""
    pairs = all_pairs(scores)
    return random.Random(seed).sample(pairs, min(n, len(pairs)))


def tournament(scores: Sequence[float]) -> Pairs:
    """Neighbours meet, the winners meet again until one is left: k candidates give k - 1 pairs, less those of equals.

    Of equals the earlier goes on; the last of an odd number goes on without a match.

    *Source*: SLiC-HF, arXiv:2305.10425, section 2.2: what a pairwise ranker does to the samples of a prompt.

    Example:
        >>> tournament([0.3, 0.9, 0.1])
        [(1, 0), (1, 2)]
    """
    pairs: Pairs = []
    left = list(range(len(scores)))
    while len(left) > 1:
        matches = [(a, b) if scores[a] >= scores[b] else (b, a) for a, b in zip(left[::2], left[1::2], strict=False)]
        pairs += matches
        left = [winner for winner, _ in matches] + left[len(left) // 2 * 2 :]
    return _strict(scores, pairs)


def _strict(scores: Sequence[float], pairs: Pairs) -> Pairs:
    return [(a, b) for a, b in pairs if scores[a] > scores[b]]
