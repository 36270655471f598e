"""Did you mean: the known word nearest to an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """Candidates that `word` may be a slip of, the likeliest first.

    A slip is one wrong, missing, extra or swapped letter, or about a third of the word.

    Example:
        >>> nearest("learning_rat", ["learning_rate", "lr_scheduler", "seed"])
        ['learning_rate']
        >>> nearest("dop", ["dpo", "ipo", "sft"])
        ['dpo']
        >>> nearest("epochs", ["seed"])
        []
    """
    found = []
    for candidate in dict.fromkeys(candidates):
        edits = distance(word.lower(), candidate.lower())
        if edits <= max(1, min(len(word), len(candidate)) // 3) and edits < max(len(word), len(candidate)):
            found.append((edits, -SequenceMatcher(None, word, candidate).ratio(), candidate))
    return [candidate for _, _, candidate in sorted(found, key=lambda each: each[:2])]


def distance(a: str, b: str) -> int:
    """Least number of letters inserted, deleted, replaced or swapped with their neighbour that turn `a` into `b`.

    Example:
        >>> distance("dpo", "dop"), distance("sft", "sf"), distance("beta", "beta")
        (1, 1, 0)
    """
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """``; did you mean `x`?`` for the nearest candidate, or nothing."""
    found = nearest(word, candidates)
    return f"; did you mean `{found[0]}`?" if found else ""
