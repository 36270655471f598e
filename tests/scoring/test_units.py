from __future__ import annotations

import time

import pytest

from align.scoring.units import capital_words, count_sentences, count_words


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("one", 1), ("one, two - three!", 3), ("it's", 2), ("**a** b_c 3.5", 4), ("über 東京", 2)],
)
def test_words(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("I AM here", ["I", "AM"]),
        ("NASA's U.S. R&D WELL-KNOWN DON'T", ["U.S", "R&D", "WELL-KNOWN", "DON'T"]),
        ("3D 42 Ab", ["3D"]),
    ],
)
def test_capital_words(text: str, words: list[str]) -> None:
    assert capital_words(text) == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("...", 0),
        ("No mark", 1),
        ("One. Two! Three?", 3),
        ("One. Two. And three", 3),
        ("small letters. they count. all the same.", 3),
        ("What?! Yes!!! Really...", 3),
        ("Well... that is one.", 1),
        ("Well... That is two.", 2),
        ("Mr. and Mrs. Smith met Dr. Who.", 1),
        ("J. R. R. Tolkien wrote it. I did not.", 2),
        ("It was I. You know.", 2),
        ("It costs $3.50, e.g. at noon. Fine.", 2),
        ("At 5 p.m. we left. Then at 6 p.m. It rained.", 3),
        ("Bring cups, plates, etc. for all. Bring cups, etc. We eat.", 3),
        ('"Why?" he asked. "Because." She left.', 3),
        ("(It rained.) We left.", 2),
        ("It rained (a lot!) today.", 1),
        ("1. First do this.\n2. Then do that.", 2),
        ("Things:\n1. First\n2. Second\n", 1),
        ("**Bold end.** Next.", 2),
        ("A heading\n\nA sentence.", 1),
        ("東京です。大阪です！", 2),
        ("यह एक है। यह दो है।", 2),
        ("See www.example.com for more.", 1),
    ],
)
def test_sentences(text: str, sentences: int) -> None:
    assert count_sentences(text) == sentences


@pytest.mark.parametrize("text", ["." * 100_000, "a. " * 50_000, "Mr. " * 50_000, "a.\n" * 50_000, "." * 50_000 + "x"])
def test_any_text_is_counted_in_linear_time(text: str) -> None:
    began = time.perf_counter()
    count_sentences(text)
    assert time.perf_counter() - began < 2.0
