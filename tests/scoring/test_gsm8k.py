"""Answers to grade-school mathematics: the published extraction, other endings, and the published judgements."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from align.errors import DataError
from align.scoring import get_scorer, score_completion, score_label
from align.scoring.gsm8k import Gsm8k, final_answer, gold_answer, marked_answer

DISAGREEMENTS: dict[tuple[int, str], str] = {}
"""(row, model) -> our answer, the gold one and why we differ from the published `is_correct`: of 5,276, none."""

ODD_ENDINGS: dict[tuple[int, str], tuple[str | None, str]] = {
    (5, "175b_finetuning"): (None, "cut off in a calculation"),
    (48, "175b_finetuning"): (None, "runs on in threes"),
    (150, "6b_finetuning"): (None, "runs on in 18s"),
    (150, "175b_finetuning"): (None, "runs on in 18s"),
    (162, "175b_finetuning"): (None, "cut off in a calculation"),
    (507, "6b_finetuning"): ("-1.8", "`A: -1.8 billion`: a unit after the number; the gold is 2"),
    (593, "6b_finetuning"): (None, "cut off in a calculation"),
    (633, "6b_finetuning"): (None, "runs on in 27s"),
    (756, "175b_finetuning"): (None, "cut off in algebra"),
    (852, "175b_verification"): (None, "the whole solution is `25`; the gold is 123"),
    (931, "175b_finetuning"): (None, "`A: 10+John's age`: a formula"),
    (936, "6b_finetuning"): (None, "cut off in a sentence"),
    (1001, "6b_finetuning"): (None, "`A: 1/5`: a fraction; the gold is 2"),
    (1144, "175b_finetuning"): (None, "`A: 7/14`: a fraction; the gold is 34"),
    (1264, "6b_verification"): (None, "cut off in a calculation"),
}
"""(row, model) -> the number we read, and how the solution ends: all that do not end with a line `A: number`."""

CORRECT = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        ("... #### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### 3.50", "3.50"),
        ("The answer is 7", "[invalid]"),
        ("#### 12 and then #### 13", "12"),
        ("#### $18", "[invalid]"),
        ("####9", "[invalid]"),
    ],
)
def test_vector(text: str, extracted: str) -> None:
    """The vector `gsm8k_answer_extraction`."""
    assert (marked_answer(text) or "[invalid]") == extracted


@pytest.mark.parametrize("text", ["", "#### ", "#### ...", "#### 1.2.3", "#### ,", "####  4", "#### -", "#### ٣"])
def test_marks_without_a_number(text: str) -> None:
    assert marked_answer(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 3\n#### 18", "18"),
        ("#### $18\nA: 17", "17"),
        ("9 * 2 = 18\nA: 18\nQ: How many?\nA: 5", "18"),
        ("A: $1,234.50.", "1234.5"),
        ("A: -$5", "-5"),
        ("A: $-5", None),
        ("A: 18, I think", "18"),
        ("A: 18 eggs - a lot", "18"),
        ("A: 5 + 3", None),
        ("A: 10-12", None),
        ("A: 1/2", None),
        ("A: five", None),
        ("So A: 5", None),
        ("5 and 3 make 8. The answer is 8.", "8"),
        ("The answer is 7. No: The answer is $1,008 in all.", "1008"),
        ("The answer is unknown", None),
        ("It is 25", None),
    ],
)
def test_endings(text: str, number: str | None) -> None:
    assert final_answer(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Janet sells <<16-7=9>>9.\n#### 18", "18"),
        ("Janet sells <<16-7=9>>9.\nA: 1,018", "1018"),
        (" 18 ", "18"),
        ("-1,800.0", "-1800"),
        (18, "18"),
        (2.5, "2.5"),
        (1e20, "1e20"),
    ],
)
def test_gold_in_every_form(answer: Any, number: str) -> None:
    assert gold_answer(answer) == Decimal(number)


@pytest.mark.parametrize("answer", ["", "eighteen", "#### ", True, float("nan"), [18], "x" * 500])
def test_a_gold_without_a_number_is_told(answer: Any) -> None:
    with pytest.raises(DataError, match="`answer` holds no number") as caught:
        gold_answer(answer)
    assert len(caught.value.message) < 120


@pytest.mark.parametrize(
    ("completion", "score"), [("#### 18", 1.0), ("A: 18.00", 1.0), ("#### 1,8", 1.0), ("#### 81", 0.0), ("", 0.0)]
)
def test_scores(completion: str, score: float) -> None:
    assert Gsm8k().score("How many?", completion, answer="#### 18") == score


def test_registered() -> None:
    scorer = get_scorer("gsm8k")
    assert score_label("gsm8k", scorer) == "correct"
    assert score_completion("correct", scorer, "How many?", "#### 18", {"answer": 18, "question": "?"}, 3) == 1.0
    with pytest.raises(DataError, match=r"holds no number: 'none' \(row 3\)"):
        score_completion("correct", scorer, "How many?", "#### 18", {"answer": "none"}, 3)


@pytest.fixture(scope="module")
def published(align_data: Path) -> list[dict[str, Any]]:
    path = align_data / "math" / "gsm8k_example_model_solutions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_agrees_with_the_published_judgements(published: list[dict[str, Any]]) -> None:
    scorer, ours, differ = Gsm8k(), Counter(), set()
    for row, each in enumerate(published):
        for model in CORRECT:
            correct = scorer.score(each["question"], each[model]["solution"], answer=each["ground_truth"]) == 1.0
            ours[model] += correct
            if correct is not each[model]["is_correct"]:
                differ.add((row, model))
    assert len(published) * len(CORRECT) == 5_276
    assert differ == set(DISAGREEMENTS)
    assert ours == CORRECT


def test_every_odd_ending_is_explained(published: list[dict[str, Any]]) -> None:
    read = {}
    for row, each in enumerate(published):
        for model in CORRECT:
            last = each[model]["solution"].split("\n")[-1]
            number = last.removeprefix("A: ").replace(",", "").removeprefix("-")
            if not last.startswith("A: ") or not number.replace(".", "", 1).isdigit():
                answer = final_answer(each[model]["solution"])
                read[row, model] = None if answer is None else str(answer)
                assert not each[model]["is_correct"]
    assert read == {place: answer for place, (answer, _) in ODD_ENDINGS.items()}


@pytest.mark.parametrize(("file", "rows"), [("gsm8k_train", 7_473), ("gsm8k_test", 1_319)])
def test_every_solution_of_gsm8k_solves_itself(align_data: Path, file: str, rows: int) -> None:
    lines = (align_data / "math" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert [Gsm8k().score("", answer, answer=answer) for answer in answers] == [1.0] * rows
