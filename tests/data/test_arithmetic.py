"""Expressions as solutions write them, and text that is none: no `eval`, no exception, no long wait."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16-3-4", 9),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("100/5/2", 10),
        ("180//7", 25),
        ("-3 - -3", 0),
        ("2*-3", -6),
        ("-(2+3)", -5),
        ("- 5%", -0.05),
        ("50000*5%", 2500),
        ("3*(2+150%)", 10.5),
        (".25*78", 19.5),
        ("12.", 12),
        ("12*20,000", 240_000),
        ("1,234,567.5", 1_234_567.5),
        ("$5 + $2.50", 7.5),
        ("-$5", -5),
        ("€10/₩4", 2.5),
        ("6 × 7 ÷ 2 − 1", 20),
        ("\n 8 ", 8),
    ],
)
def test_worked_out(text: str, value: float) -> None:
    assert evaluate(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "$",
        "1/0",
        "1//0",
        "5/(2-2)",
        "2**3",
        "2x3",
        "28-2x",
        "¾*4",
        "1e5",
        "3 4",
        "(3)(4)",
        "(3",
        "3)",
        "()",
        "3+",
        "*3",
        "1,23",
        "12,345,67",
        "1.2.3",
        "5%%",
        "0.0625*100%.01",
        "10%3",
        "٣+٤",
        "2=2",
        "__import__('os')",
        "1 if 1 else 2",
        "inf",
        "nan",
    ],
)
def test_nonsense_is_none(text: str) -> None:
    assert evaluate(text) is None


def test_length_is_limited() -> None:
    assert evaluate("1+" * (MAX_LENGTH // 2 - 1) + "11") == MAX_LENGTH // 2 - 1 + 11
    assert evaluate("1+" * (MAX_LENGTH // 2) + "1") is None


def test_depth_is_limited() -> None:
    assert evaluate("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH) == 7
    assert evaluate("(" * (MAX_DEPTH + 1) + "7" + ")" * (MAX_DEPTH + 1)) is None


def test_the_worst_text_is_refused_at_once() -> None:
    began = time.perf_counter()
    assert evaluate("(" * MAX_LENGTH) is None
    assert evaluate("9" * MAX_LENGTH + ",") is None
    assert evaluate("-" * (MAX_LENGTH - 1) + "1") == -1
    assert evaluate("(" * 10**6) is None
    assert time.perf_counter() - began < 0.5


def test_the_longest_numbers_stay_finite() -> None:
    nines = "9" * (MAX_LENGTH // 2 - 1)
    assert math.isfinite(evaluate(f"{nines}*{nines}"))
    assert math.isfinite(evaluate(f"{nines}/.{'0' * (MAX_LENGTH // 2 - 4)}1"))


@given(st.text("0123456789.,+-*/()% $x", max_size=40))
def test_any_text_gives_a_number_or_none(text: str) -> None:
    value = evaluate(text)
    assert value is None or math.isfinite(value)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        return str(draw(st.integers(0, 999)))
    left, right = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    inner = f"{left} {draw(st.sampled_from(['+', '-', '*', '/', '//']))} {right}"
    return f"({inner})" if draw(st.booleans()) else inner


@given(expressions())
def test_agrees_with_python(text: str) -> None:
    try:
        expected = eval(text)
    except ZeroDivisionError:
        expected = None
    if len(text) > MAX_LENGTH:
        expected = None
    assert evaluate(text) == (None if expected is None else pytest.approx(expected))
