"""The calculations that a solution shows: annotations ``<<lhs=rhs>>``, as GSM8K writes them."""

from __future__ import annotations

from typing import Final

from align.data.arithmetic import evaluate

TOLERANCE: Final = 1e-3
"""Two sides that differ by less are equal: solutions round."""


def equations(text: str) -> list[str]:
    """What stands between each ``<<`` and the next ``>>``, without white space, in order.

    Example:
        >>> equations("He pays $<<2 * 9=18>>18, <<18/3=6>>6 each, and <<goes")
        ['2*9=18', '18/3=6']
    """
    pieces = text.split(">>")[:-1]  # not a regular expression: many `<<` without an end would cost it quadratic time
    return ["".join(piece.partition("<<")[2].split()) for piece in pieces if "<<" in piece]


def is_true(equation: str) -> bool:
    """Whether the first two sides of an equation are numbers, and the same; of ``a=b=c`` the last is not looked at.

    Example:
        >>> is_true("2*9=18"), is_true("10/3=3.333"), is_true("2+2=5"), is_true("x=x")
        (True, True, False, False)
    """
    sides = [evaluate(side) for side in equation.split("=")[:2]]
    if len(sides) < 2 or sides[0] is None or sides[1] is None:
        return False
    return abs(sides[0] - sides[1]) < TOLERANCE
