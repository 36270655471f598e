from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import DataError
from align.scoring import columns_read, get_scorer, score_completion, score_label
from align.scoring.ifeval import IFEval, instructions_of
from align.scoring.instructions import INSTRUCTIONS

NAMES = ["punctuation:no_comma", "length_constraints:number_words", "detectable_format:title"]
SETTINGS: list[dict[str, Any]] = [{}, {"num_words": 3, "relation": "at least"}, {}]


@pytest.mark.parametrize(
    ("completion", "share"), [("<<Joy>> and more", 1.0), ("no joy at all", 2 / 3), ("joy, joy", 0.0), (" \n", 0.0)]
)
def test_the_share_that_is_followed(completion: str, share: float) -> None:
    assert IFEval().score("Write.", completion, instruction_id_list=NAMES, kwargs=SETTINGS) == pytest.approx(share)


def test_nulls_and_whole_floats_of_tables_are_understood() -> None:
    settings = [
        None,
        {"num_words": 3.0, "relation": "at least", "num_sentences": None},
        {"num_words": None, "relation": None},
    ]
    assert IFEval().score("Write.", "<<Joy>> and more", instruction_id_list=NAMES, kwargs=settings) == 1.0


@pytest.mark.parametrize(
    ("names", "settings", "told"),
    [
        ([], [], "two lists"),
        ("punctuation:no_comma", [{}], "two lists"),
        (["punctuation:no_comma"], [], "two lists"),
        (["punctuation:no_commas"], [{}], "`punctuation:no_commas`; did you mean `punctuation:no_comma`"),
        (["punctuation:no_comma"], [{"num": 1}], "`punctuation:no_comma` has no setting `num`"),
        (["punctuation:no_comma"], ["none"], "are 'none'"),
        (["keywords:existence"], [{}], "`keywords` of `keywords:existence` is None"),
        (["keywords:existence"], [{"keywords": "cat"}], "is 'cat'"),
        (["keywords:existence"], [{"keywords": []}], r"is \[\]"),
        (["language:response_language"], [{"language": "tlh"}], "is 'tlh'"),
        (["length_constraints:number_words"], [{"num_words": 3.5, "relation": "at least"}], "is 3.5"),
        (["length_constraints:number_words"], [{"num_words": float("nan"), "relation": "at least"}], "is nan"),
        (["length_constraints:number_words"], [{"num_words": True, "relation": "at least"}], "is True"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "at most"}], "`relation`.*is 'at most'"),
        (["startend:end_checker"], [{"end_phrase": ""}], "is ''"),
    ],
)
def test_what_is_not_understood_is_told(names: Any, settings: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        IFEval().score("Write.", "A text", instruction_id_list=names, kwargs=settings)
    assert caught.value.fix


def test_registered() -> None:
    scorer = get_scorer("ifeval")
    assert score_label("ifeval", scorer) == "followed"
    assert columns_read("ifeval", scorer) == ("instruction_id_list", "kwargs")
    fields = {"key": 1000, "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    assert score_completion("followed", scorer, "Quote.", '"Yes."', fields, 3) == 1.0


@pytest.fixture(scope="module")
def rows(align_data: Path) -> list[dict[str, Any]]:
    path = align_data / "eval" / "ifeval_input_data.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_of_the_published_data_is_understood(rows: list[dict[str, Any]]) -> None:
    checks = [instructions_of(row["instruction_id_list"], row["kwargs"]) for row in rows]
    assert len(rows) == 541
    assert sum(map(len, checks)) == 834
    assert {check for own in checks for check, _ in own} == set(INSTRUCTIONS.values())


def test_the_prompts_themselves_follow_few_instructions(rows: list[dict[str, Any]]) -> None:
    """An answer that only repeats its prompt is no good answer, nor does any instruction hold of all texts."""
    scorer = IFEval()
    scores = [scorer.score("", row["prompt"], **{column: row[column] for column in scorer.reads}) for row in rows]
    assert 0.1 < sum(scores) / len(scores) < 0.5
