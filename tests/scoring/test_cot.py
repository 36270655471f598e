from __future__ import annotations

import pytest

from align.scoring.cot import Kind, cot_answer


@pytest.mark.parametrize(
    ("kind", "few_shot", "text", "answer"),
    [
        ("number", False, " 1,234. So there are 12 left", "1234"),
        ("number", True, "He has 5 + 3 = 8. The answer is 8. The answer is 9.", "9"),
        ("number", True, "He has 5 apples and buys 3, giving 8.", "8"),
        ("number", False, " 8.0 apples", "8.0"),
        ("number", False, " none", ""),
        ("number", False, " 10-3 = 7", "10"),
        ("option", False, " (B) because A is wrong", "B"),
        ("option", False, " Definitely C", "D"),
        ("yes_no", False, " No, yes.", "no"),
        ("yes_no", False, " unknown", ""),
    ],
)
def test_vector(kind: Kind, few_shot: bool, text: str, answer: str) -> None:
    """The vector `cot_answer_extraction`."""
    assert (cot_answer(text, kind, few_shot=few_shot) or "") == answer


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", "The answer is 3. Then 4 more make 7.", "3"),
        ("number", "The answer is", None),
        ("option", "A or B. The answer is (C).", "C"),
        ("yes_no", "No one knows. The answer is yes.", "yes"),
        ("number", "The answer is -5.", "-5"),
    ],
)
def test_few_shot_reads_after_the_last_cue(kind: Kind, text: str, answer: str | None) -> None:
    assert cot_answer(text, kind, few_shot=True) == answer
