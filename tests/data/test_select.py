from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.select import (
    above,
    adjacent,
    all_pairs,
    best_of,
    best_vs_worst,
    random_pairs,
    ranked,
    rft,
    top_fraction,
    tournament,
)

RFT_SELECTION = [
    "<<2*4=8>>8 directly.\n#### 8",
    "First <<2+2=4>>4 then <<4*2=8>>8.\n#### 8",
    "Two plus two is <<2 + 2=4>>4; doubled that gives <<4*2=8>>8 in all.\n#### 8",
    "Wrong <<2+2=5>>5, <<5+3=8>>8.\n#### 8",
    "<<3+3=6>>6.\n#### 6",
    "It is 8.\n#### 8",
]
"""The vector `rft_selection`: gold 8, kept 0, 2 and 5."""

SCORES = [0.3, 0.9, 0.1, 0.5, 0.8, 0.2, 0.7, 0.4]
"""The vector `slic_tournament`."""

NO_TWO_OR_MORE = [[], [1.0], [2.0, 2.0, 2.0]]


def test_rft_vector() -> None:
    assert rft(RFT_SELECTION, [text.endswith("#### 8") for text in RFT_SELECTION]) == [0, 2, 5]


def test_rft_keeps_the_first_where_nothing_else_is_kept() -> None:
    assert rft(["<<1+1=2>>2", "That is then <<1+1=2>>2"], [True, True]) == [0]


def test_rft_keeps_one_without_equations() -> None:
    assert rft(["8", "It is 8", "eight"], [True, True, True]) == [0]


def test_rft_of_nothing_right() -> None:
    assert rft([], []) == []
    assert rft(["<<1+1=2>>", "<<1+1=3>>", "<<a>>"], [False, True, True]) == []


def table_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def rft_by_lists(texts: list[str], correct: list[bool]) -> list[int]:
    """The rule in other words: two lists side by side, no distance remembered."""
    keys: list[str] = []
    kept: list[int] = []
    for i, text in enumerate(texts):
        found = [each.replace(" ", "") for each in re.findall("<<([^>]*)>>", text)]
        if not correct[i] or any(eval(left) != eval(right) for left, right in (each.split("=") for each in found)):
            continue
        key = "|".join(found)
        if key not in keys:
            keys.append(key)
            kept.append(i)
            continue
        place = keys.index(key)
        others = [texts[k] for k in kept if k != kept[place]]
        now = sum(table_distance(texts[kept[place]], other) for other in others)
        if sum(table_distance(text, other) for other in others) > now:
            kept[place] = i
    return sorted(kept)


SOLUTIONS = st.lists(
    st.tuples(
        st.text("ab ", max_size=8),
        st.sampled_from(["", "<<1+1=2>>", "<<1 + 1=2>>", "<<2+1=3>>", "<<1+1=2>><<2+1=3>>", "<<1+1=3>>"]),
    ).map("".join),
    max_size=8,
)


@given(SOLUTIONS, st.data())
def test_rft_agrees_with_the_rule_in_other_words(texts: list[str], data: st.DataObject) -> None:
    correct = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    assert rft(texts, correct) == rft_by_lists(texts, correct)


def test_best_of() -> None:
    assert best_of(SCORES, 3) == [1, 4, 6]
    assert best_of([1.0, 2.0, 2.0], 1) == [1]
    assert best_of([1.0], 5) == [0]
    assert best_of([1.0], 0) == best_of([], 2) == []


@pytest.mark.parametrize(("count", "fraction", "kept"), [(10, 0.3, 3), (100, 0.29, 29), (15, 0.1, 1), (3, 0.1, 1)])
def test_top_fraction(count: int, fraction: float, kept: int) -> None:
    scores = [float(i * 7 % count) for i in range(count)]
    chosen = top_fraction(scores, fraction)
    assert len(chosen) == kept
    assert chosen == sorted(chosen)
    assert min(scores[i] for i in chosen) > max(scores[i] for i in range(count) if i not in chosen)


def test_top_fraction_takes_the_earlier_of_equals() -> None:
    assert top_fraction([1.0] * 4, 0.5) == [0, 1]
    assert top_fraction([3.0, 1.0], 1.0) == [0, 1]
    assert top_fraction([], 0.5) == []


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_top_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        top_fraction([1.0], fraction)


def test_above_is_reached() -> None:
    assert above([0.0, 1.0, 0.5, 1.0], 1.0) == [1, 3]


def test_best_vs_worst() -> None:
    assert best_vs_worst(SCORES) == [(1, 2)]


def test_all_pairs() -> None:
    assert all_pairs([1.0, 3.0, 2.0, 3.0]) == [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]


def test_adjacent() -> None:
    assert adjacent([1.0, 3.0, 2.0, 3.0]) == [(3, 2), (2, 0)]


def test_random_pairs_depend_on_the_seed_alone() -> None:
    drawn = [random_pairs(SCORES, 4, seed) for seed in range(20)]
    assert drawn == [random_pairs(SCORES, 4, seed) for seed in range(20)]
    assert len({tuple(pairs) for pairs in drawn}) > 10
    assert all(len(set(pairs)) == 4 for pairs in drawn)


def test_random_pairs_reach_every_pair_equally() -> None:
    drawn = [random_pairs([1.0, 2.0, 3.0], 1, seed)[0] for seed in range(600)]
    assert {drawn.count(pair) > 150 for pair in all_pairs([1.0, 2.0, 3.0])} == {True}


def test_tournament_vector() -> None:
    assert tournament(SCORES) == [(1, 0), (3, 2), (4, 5), (6, 7), (1, 3), (4, 6), (1, 4)]


def test_tournament_of_an_odd_number() -> None:
    assert tournament([1.0, 2.0, 3.0, 4.0, 5.0]) == [(1, 0), (3, 2), (3, 1), (4, 3)]


def test_tournament_leaves_out_matches_of_equals() -> None:
    assert tournament([1.0, 1.0, 0.5, 0.0]) == [(2, 3), (0, 2)]


@pytest.mark.parametrize("scores", NO_TWO_OR_MORE)
@pytest.mark.parametrize("make", [best_vs_worst, all_pairs, adjacent, tournament, lambda s: random_pairs(s, 3, 0)])
def test_no_pair_without_a_better_one(make, scores: list[float]) -> None:
    assert make(scores) == []


@given(st.lists(st.integers(-3, 3).map(float), max_size=9))
def test_every_pair_is_strict(scores: list[float]) -> None:
    every = all_pairs(scores)
    assert len(set(every)) == len(every)
    for pairs in (best_vs_worst(scores), adjacent(scores), tournament(scores), random_pairs(scores, 3, 1)):
        assert set(pairs) <= set(every)
        assert len(set(pairs)) == len(pairs)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12, unique=True))
def test_tournament_of_different_scores(scores: list[float]) -> None:
    pairs = tournament(scores)
    assert len(pairs) == len(scores) - 1
    assert {worse for _, worse in pairs} == set(range(len(scores))) - {ranked(scores)[0]}
