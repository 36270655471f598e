"""Candidates of which nothing is decided yet, and what prompts keep of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data import load_prompts
from align.data.fields import fields_of
from align.data.formats import parse_row
from align.data.preview import preview_records
from align.data.reading import Reading
from align.data.records import BadRow, Prompt, Samples
from align.data.sources import read_rows
from align.spec.data import FileData
from tests.data.conversations import conversation
from tests.data.tokenizers import tokenizer_of

WHY = conversation("why")


def samples(row: dict[str, Any], **columns: str) -> Samples:
    record = parse_row("samples", row, columns, number=7)
    assert isinstance(record, Samples)
    return record


def test_a_row_may_say_no_more_than_its_answers() -> None:
    assert samples({"prompt": "why", "responses": ["a", "", "a"]}) == Samples(
        7, WHY, ["a", "", "a"], ["", "", ""], [True, True, True]
    )


def test_a_row_as_stages_write_it() -> None:
    row = {
        "prompt": WHY,
        "responses": ["a", "b"],
        "sources": ["sft", "data.chosen"],
        "ended": [False, True],
        "scores": [None, 0.5],
        "target": "b",
        "fields": {"answer": "4"},
    }
    made = samples(row)
    assert (made.sources, made.ended, made.scores) == (["sft", "data.chosen"], [False, True], [None, 0.5])
    assert made.target == conversation("", "b")[1:]
    assert fields_of(row, {}) == {"answer": "4"}


def test_the_forms_of_a_ranked_list_are_understood() -> None:
    objects = [{"output": "a", "points": 1}, {"output": "b", "points": 2}]
    assert samples({"instruction": "why", "responses": objects}, response="output", score="points").scores == [1, 2]
    assert samples({"messages": WHY, "output": ["a", "b"]}).scores is None
    assert samples({"prompt": "why", "responses": [{"role": "assistant", "content": "a"}]}).responses == ["a"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "why"}, "no column `responses`"),
        ({"prompt": "why", "responses": []}, "`responses` is an empty list"),
        ({"prompt": "why", "responses": [conversation("", "a", "b", "c")[1:]]}, "is not one turn of the assistant"),
        ({"prompt": conversation("a", "b"), "responses": ["c"]}, "`prompt` does not end with the user"),
        ({"prompt": "why", "responses": ["a"], "sources": ["x", "y"]}, "`sources` is not one text for each candidate"),
        ({"prompt": "why", "responses": ["a"], "ended": [1]}, "`ended` is not one true or false for each candidate"),
        ({"prompt": "why", "responses": ["a"], "scores": [1, 2]}, "`scores` and `responses` differ in length"),
    ],
)
def test_other_rows_are_malformed(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        samples(row)
    assert reason in caught.value.reason


def entry(path: Path, *rows: dict[str, Any], **settings: Any) -> FileData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileData(path=str(path), **settings)


def prompts(source: FileData, folder: Path) -> list[Any]:
    return load_prompts(source, tokenizer=tokenizer_of("chatml"), max_tokens=512, folder=folder)[0]


def test_a_prompt_keeps_the_other_columns_of_its_row(tmp_path: Path) -> None:
    row = {"question": "2 + 2?", "result": "4", "level": 1}
    source = entry(tmp_path / "p.jsonl", row, format="prompts", columns={"prompt": "question", "answer": "result"})
    (prompt,) = prompts(source, tmp_path)
    assert prompt.fields == {**row, "prompt": "2 + 2?", "answer": "4"}
    assert (prompt.text, prompt.answers, prompt.target) == ("2 + 2?", {}, None)


@pytest.mark.parametrize(
    ("format", "row", "answers", "target"),
    [
        ("prompt_completion", {"prompt": "why", "completion": "a"}, {"completion": "a"}, "a"),
        ("messages", {"messages": conversation("x", "y", "why", "a")}, {"completion": "a"}, "a"),
        ("pairs", {"prompt": "why", "chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b"}, "a"),
        ("ranked", {"prompt": "why", "responses": ["b", "a"], "scores": [1, 2]}, {"0": "b", "1": "a"}, "a"),
        ("samples", {"prompt": "why", "responses": ["b", "a"]}, {"0": "b", "1": "a"}, None),
        ("unpaired", {"prompt": "why", "completion": "a", "label": False}, {"completion": "a"}, None),
        ("prompts", {"messages": conversation("why", "a")}, {"completion": "a"}, "a"),
    ],
)  # fmt: skip
def test_a_prompt_knows_what_its_row_answers(
    format: Any, row: dict[str, Any], answers: dict[str, str], target: str | None, tmp_path: Path
) -> None:
    (prompt,) = prompts(entry(tmp_path / "rows.jsonl", row, format=format), tmp_path)
    assert prompt.text == "why"
    assert (prompt.answers, prompt.target) == (answers, target)


def test_answers_of_several_turns_are_no_answers_to_a_prompt(tmp_path: Path) -> None:
    row = {"prompt": "why", "chosen": conversation("", "a", "b", "c")[1:], "rejected": "d"}
    (prompt,) = prompts(entry(tmp_path / "rows.jsonl", row, format="pairs"), tmp_path)
    assert (prompt.answers, prompt.target) == ({"rejected": "d"}, None)


def test_two_prompts_are_one_whatever_answers_them(tmp_path: Path) -> None:
    rows = [{"prompt": "why", "completion": each} for each in "ab"]
    found = prompts(entry(tmp_path / "rows.jsonl", *rows, format="prompt_completion"), tmp_path)
    assert [prompt.target for prompt in found] == ["a"]
    assert Prompt(1, WHY, (("completion", WHY),)) == Prompt(1, WHY)


def test_candidates_are_shown_with_what_is_known_of_them(tmp_path: Path) -> None:
    from rich.console import Console

    row = {"prompt": "why", "responses": ["a", "b"], "sources": ["sft", "sft"], "ended": [True, False]}
    source = entry(tmp_path / "rows.jsonl", {**row, "scores": [0.5, None]}, format="samples")
    with (console := Console(width=80)).capture() as shown:
        console.print(preview_records(source, tmp_path, 1))
    assert "sft, score 0.5" in shown.get()
    assert "sft, cut off" in shown.get()


def test_candidates_with_other_scores_are_no_duplicates(tmp_path: Path) -> None:
    row = {"prompt": "why", "responses": ["a", "b"]}
    rows = [row, row, {**row, "scores": [1, 2]}, {**row, "sources": ["x", "y"]}]
    source = entry(tmp_path / "rows.jsonl", *rows, format="samples")
    assert len(list(read_rows(source, tmp_path))) == 4
    assert len(list(Reading(source, tmp_path).records())) == 3
