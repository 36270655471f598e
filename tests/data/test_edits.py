from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.edits import levenshtein


def by_the_table(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize(
    ("a", "b", "edits"), [("", "", 0), ("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_known(a: str, b: str, edits: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == edits


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_agrees_with_the_table(a: str, b: str) -> None:
    assert levenshtein(a, b) == by_the_table(a, b)


@given(st.text(max_size=100), st.text(max_size=100))
def test_of_any_text(a: str, b: str) -> None:
    assert levenshtein(a, b) == by_the_table(a, b)
