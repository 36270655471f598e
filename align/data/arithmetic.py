"""Arithmetic in text, worked out by a parser of its own: what a model wrote never reaches `eval`.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | "//") signed)*
    signed  = ("+" | "-")* (number | "(" sum ")") "%"?

`%` is percent, as people write it, and not Python's remainder. A number may have thousands commas (``1,234.5``) and
begin or end with its point. Currency signs are passed over like blanks; ``×``, ``÷`` and ``−`` are understood.
"""

from __future__ import annotations

import re
from typing import Final

MAX_LENGTH: Final = 200
"""Longest expression that is worked out. No result of so few digits leaves the range of a float."""
MAX_DEPTH: Final = 20
"""Parentheses within parentheses."""

NUMBER: Final = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"

_TOKEN = re.compile(rf"({NUMBER})|(//|[-+*/()%])|[\s$€£¥₩]+", re.ASCII)
_SIGNS = str.maketrans("×÷−", "*/-")


class _Nonsense(Exception):
    """Not an expression."""


def evaluate(text: str) -> float | None:
    """The value of an arithmetic expression; None for anything else, a division by zero included.

    Example:
        >>> evaluate("(1,200 - $200) * 5%"), evaluate("7 // 2 / 2"), evaluate("-.5")
        (50.0, 1.5, -0.5)
        >>> evaluate("2**3"), evaluate("1/0"), evaluate("x + 1"), evaluate("3 4")
        (None, None, None, None)
    """
    if len(text) > MAX_LENGTH:
        return None
    try:
        tokens = _Tokens(text.translate(_SIGNS))
        value = _sum(tokens, 0)
    except (_Nonsense, ZeroDivisionError):
        return None
    return value if tokens.next is None else None


class _Tokens:
    """Numbers and signs, one ahead: `next` is None after the last."""

    def __init__(self, text: str) -> None:
        self._rest = iter(_tokens(text))
        self.next: float | str | None = None
        self.take()

    def take(self) -> float | str | None:
        """The next one, after which its successor is the next."""
        taken, self.next = self.next, next(self._rest, None)
        return taken


def _tokens(text: str) -> list[float | str]:
    found: list[float | str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Nonsense
        if match[1]:
            found.append(float(match[1].replace(",", "")))
        elif match[2]:
            found.append(match[2])
        position = match.end()
    return found


def _sum(tokens: _Tokens, depth: int) -> float:
    value = _product(tokens, depth)
    while tokens.next in ("+", "-"):
        sign = 1.0 if tokens.take() == "+" else -1.0
        value += sign * _product(tokens, depth)
    return value


def _product(tokens: _Tokens, depth: int) -> float:
    value = _signed(tokens, depth)
    while tokens.next in ("*", "/", "//"):
        operator, right = tokens.take(), _signed(tokens, depth)
        if operator == "*":
            value *= right
        else:
            value = value / right if operator == "/" else value // right
    return value


def _signed(tokens: _Tokens, depth: int) -> float:
    sign = 1.0
    while tokens.next in ("+", "-"):
        sign = -sign if tokens.take() == "-" else sign
    first = tokens.take()
    if isinstance(first, float):
        value = first
    elif first == "(" and depth < MAX_DEPTH:
        value = _sum(tokens, depth + 1)
        if tokens.take() != ")":
            raise _Nonsense
    else:
        raise _Nonsense
    if tokens.next == "%":
        tokens.take()
        value /= 100
    return sign * value
