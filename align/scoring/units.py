"""Words and sentences of a text, counted without trained models."""

from __future__ import annotations

import re
from typing import Final

_WORD: Final = re.compile(r"\w+")
_COMPOUND: Final = re.compile(r"\w+(?:[-'’&.]\w+)*")

_END: Final = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s|$)|[。！？।]+")
"""Where a sentence may end: marks, closing quotes and brackets, and a blank; or marks that need no blank."""

_BEFORE_NAMES: Final = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "mt", "gen", "capt", "vs", "cf", "fig", "e.g", "i.e"]
)
"""Abbreviations that something always follows."""

_SHORT: Final = frozenset(["etc", "jr", "sr", "inc", "ltd", "co", "approx", "dept", "est"])
"""Abbreviations that may end a sentence: it goes on if a small letter follows."""

_REACH: Final = 60
"""How many characters on either side of a mark tell whether it ends a sentence."""


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: "it's" is two.

    Example:
        >>> count_words("It's 8 o'clock - really?")
        6
    """
    return len(_WORD.findall(text))


def capital_words(text: str) -> list[str]:
    """Words without a lower-case letter; what a hyphen, apostrophe, point or ``&`` joins is one word.

    Example:
        >>> capital_words("I saw NASA's WELL-KNOWN R&D lab in the U.S. in 1999")
        ['I', 'WELL-KNOWN', 'R&D', 'U.S']
    """
    return [word for word in _COMPOUND.findall(text) if word.isupper()]


def count_sentences(text: str) -> int:
    """Sentences; a text that ends without a mark ends one all the same.

    A point does not end a sentence after a title, an initial or the number of a list item; nor does a mark before a
    small letter after an ellipsis, a quotation, a bracket or another abbreviation. A line break alone ends none,
    so a heading counts with the sentence below it.

    Example:
        >>> count_sentences("Dr. J. Doe paid $3.50 (cheap!) today. Why? He said so.")
        3
    """
    count, start = 0, 0
    for end in _END.finditer(text):
        before = text[max(start, end.start() - _REACH) : end.start()]
        if _WORD.search(before) and not _goes_on(before, end[0], text[end.end() : end.end() + _REACH].lstrip()):
            count, start = count + 1, end.end()
    return count + bool(_WORD.search(text, start))


def _goes_on(before: str, mark: str, after: str) -> bool:
    """Whether the sentence before a mark is not at its end."""
    point = mark.rstrip("*_") == "."
    line = before.rpartition("\n")[2].strip(" *_#>")
    word = line.split()[-1].lstrip("(\"'“‘[*_") if line else ""
    if point and (
        line.isdecimal() or word.lower() in _BEFORE_NAMES or (len(word) == 1 and word.isupper() and word != "I")
    ):
        return True
    pause = (
        mark.startswith(("...", "…")) or mark[-1] in "\"'”’)]" or (point and ("." in word or word.lower() in _SHORT))
    )
    return pause and after[:1].islower()
