"""The answer at the end of a chain of thought, by the rules of the zero-shot chain-of-thought code.

They are rules for comparing with published figures, warts included: an option is the first capital from A to E, so
that "Definitely C" answers D, and "10-3" answers 10. Numbers are better compared by value than as text: "8.0" is 8.
"""

from __future__ import annotations

import re
from typing import Final, Literal

Kind = Literal["number", "option", "yes_no"]

CUE: Final = "The answer is"
"""What the demonstrations of few-shot prompts say before their answers."""

_ANSWERS: Final[dict[Kind, re.Pattern[str]]] = {
    "number": re.compile(r"-?\d+\.?\d*", re.ASCII),
    "option": re.compile(r"[A-E]"),
    "yes_no": re.compile(r"\b(?:yes|no)\b"),
}


def cot_answer(text: str, kind: Kind, *, few_shot: bool) -> str | None:
    """The answer that a text gives; None if it gives none.

    *Source*: arXiv:2205.11916, appendix A.6, and its published code.

    Args:
        text: The completion. Zero-shot, it is what follows the cue ("Therefore, the answer (arabic numerals) is").
        kind: What answers look like.
        few_shot: Whether the completion holds the reasoning, too: the answer is then the first after the last cue, or
            the last of the whole text where the cue is missing.

    Example:
        >>> cot_answer("5 and 3 make 8. The answer is 8.", "number", few_shot=True)
        '8'
        >>> cot_answer(" (B), for A is wrong", "option", few_shot=False)
        'B'
    """
    last = False
    if few_shot:
        _, cue, after = text.rpartition(CUE)
        last = not cue
        text = after
    if kind == "number":
        text = text.replace(",", "")
    found = _ANSWERS[kind].findall(text.lower() if kind == "yes_no" else text)
    return found[-1 if last else 0].removesuffix(".") if found else None
