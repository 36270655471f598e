"""Verifies answers to grade-school mathematics by the number they end with."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Final

from align.errors import DataError
from align.scoring.cot import CUE, cot_answer

MARKED: Final = re.compile(r"#### (-?[0-9.,]+)")
"""How GSM8K's solutions give their answer: one space, no currency sign."""

LINE: Final = re.compile(r"^A: *(-?)[$€£¥₩]?([0-9.,]++)(?![-+*/×÷=]| +[-+*/×÷=] *[0-9(])", re.MULTILINE)
"""How the published samples of its models give theirs. A number that goes on as a calculation is not the answer."""


class Gsm8k:
    """1 if a completion ends with the right number, else 0.

    The right number is read from the column ``answer``: a GSM8K solution (``... #### 18``), one whose last line is
    ``A: 18``, or the number alone.
    """

    version: ClassVar[int] = 1
    label: ClassVar[str] = "correct"
    """Its column in results."""
    reads: ClassVar[tuple[str, ...]] = ("answer",)
    minimum: ClassVar[float] = 0.0
    maximum: ClassVar[float] = 1.0

    def score(self, prompt: str, completion: str, *, answer: Any) -> float:
        """Whether the final answer of `completion` equals the one of `answer` as a number.

        Raises:
            DataError: `answer` holds no number.
        """
        gold = gold_answer(answer)
        return float(final_answer(completion) == gold)


def marked_answer(text: str) -> str | None:
    r"""What follows the first ``####``, without commas, if it is a number: the extraction that figures are quoted with.

    *Source*: arXiv:2110.14168 and its published code; RFT (arXiv:2308.01825) uses the same.

    Example:
        >>> marked_answer("He has 1,234.\n#### 1,234"), marked_answer("#### $18")
        ('1234', None)
    """
    match = MARKED.search(text)
    return match[1].replace(",", "") if match and to_number(match[1]) is not None else None


def final_answer(text: str) -> Decimal | None:
    r"""The number that a solution ends with, in the first of these forms that it has.

    1. ``#### 18``: the first one, as `marked_answer` reads it.
    2. A line that begins with ``A: 18``: the first one, for a model that goes on invents the next question. A currency
       sign and words after the number are passed over; ``A: 7/14`` is no number.
    3. The first number after the last "The answer is", as chains of thought are prompted to end.

    Example:
        >>> final_answer("9 * 2 = 18\nA: $18.00 a day") == 18
        True
    """
    if (marked := marked_answer(text)) is not None:
        return to_number(marked)
    if match := LINE.search(text):
        return to_number(match[1] + match[2].rstrip(".,"))
    cued = cot_answer(text, "number", few_shot=True) if CUE in text else None
    return None if cued is None else to_number(cued)


def gold_answer(answer: Any) -> Decimal:
    """The right number, of whatever form the data has.

    Raises:
        DataError: There is none.
    """
    number = None
    if isinstance(answer, str):
        number = to_number(answer.strip())
        number = final_answer(answer) if number is None else number
    elif isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        number = Decimal(str(answer))
    if number is None:
        raise DataError(
            f"the column `answer` holds no number: {_short(answer)}",
            where="scorers",
            fix="a solution that ends with `#### 18` or `A: 18`, or the number alone",
        )
    return number


def to_number(text: str) -> Decimal | None:
    """A number in decimal notation, commas passed over; None for anything else."""
    try:
        return Decimal(text.replace(",", "")) if re.fullmatch(r"-?[0-9.,]+", text) else None
    except InvalidOperation:
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"...{text[-57:]}"
