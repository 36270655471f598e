"""Rows that say which answer is better: what they become, which are malformed, which are dropped, what is left off."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import Parser, parse_row
from align.data.records import BadRow, Dropped, Pair, Ranked, Unpaired
from tests.data.conversations import conversation

SYSTEM = {"role": "system", "content": "be kind"}
WHY = conversation("why")


def answer(*turns: str) -> list[Any]:
    """What follows a prompt: an answer, maybe more turns."""
    return conversation("", *turns)[1:]


def ranked(*texts: str, scores: list[float], prompt: list[Any] = WHY, **more: Any) -> Ranked:
    return Ranked(5, prompt, [answer(text) for text in texts], scores, **more)


def pair(chosen: str, rejected: str, prompt: list[Any] = WHY, **more: Any) -> Pair:
    return Pair(5, prompt, answer(chosen), answer(rejected), **more)


TWO = {"output_1": "so", "output_2": "no"}
VOTED = {"instruction": "why", "input": "", "response1": "so", "response2": "no"}
KO = {
    "conversations": WHY,
    "responses": [{"model": "a", "response": "so", "score": -1.5}, {"response": "no", "score": 2}],
}
ALPACA_EVAL = {
    "instruction": "why",
    "candidates": [{"output": "so", "judge": 1e-9}, {"output": "no", "judge": None}, {"output": "hm", "judge": 0.9}],
}
CANDIDATES = {"responses": "candidates", "score": "judge"}
BENCH = {
    "turns": ["why", "how"],
    "candidates": [{"turns": ["so", "thus"], "scores": [10, 8.5]}, {"turns": ["no", "not"], "scores": [1, 1]}],
}
TWO_TURNS = Ranked(5, WHY, [answer("so", "how", "thus"), answer("no", "how", "not")], [9.25, 1.0])

GOOD: list[tuple[str, str, dict[str, Any], Any]] = [
    (
        "margin and target",
        "pairs",
        {"prompt": "why", "chosen": "so", "rejected": "no", "margin": 0.5, "target": "thus"},
        pair("so", "no", margin=0.5, target=answer("thus")),
    ),
    (
        "whole conversations and a target",
        "pairs",
        {"chosen": conversation("why", "so"), "rejected": conversation("why", "no"), "target": answer("thus")},
        pair("so", "no", target=answer("thus")),
    ),
    (
        "margin as in a CSV",
        "pairs",
        {"prompt": "why", "chosen": "so", "rejected": "no", "margin": "0"},
        pair("so", "no"),
    ),
    ("label 1", "labelled_pairs", {"input": "why", **TWO, "label": 1}, pair("so", "no")),
    ("label 2", "labelled_pairs", {"input": "why", **TWO, "label": 2}, pair("no", "so")),
    ("label as in a CSV", "labelled_pairs", {"input": "why", **TWO, "label": "2"}, pair("no", "so")),
    ("preference", "labelled_pairs", {"instruction": "why", **TWO, "preference": 1.0}, pair("so", "no")),
    ("soft preference", "labelled_pairs", {"instruction": "why", **TWO, "preference": 1.99}, pair("no", "so")),
    (
        "all annotators agree",
        "labelled_pairs",
        {**VOTED, "annotator1": 2, "annotator2": 2, "annotator3": 2},
        pair("no", "so"),
    ),
    ("a majority", "labelled_pairs", {**VOTED, "annotator1": 0, "annotator2": 1, "annotator3": 1}, pair("so", "no")),
    (
        "one annotator said nothing",
        "labelled_pairs",
        {**VOTED, "annotator1": None, "annotator2": 1, "annotator3": 1},
        pair("so", "no"),
    ),
    (
        "instruction and input",
        "labelled_pairs",
        {**VOTED, "input": "1 2", "annotator1": 1, "weight": 2, "margin": 3, "target": "hm"},
        pair("so", "no", conversation("why\n\n1 2"), weight=2.0, margin=3.0, target=answer("hm")),
    ),
    (
        "prompt as messages",
        "labelled_pairs",
        {"prompt": conversation("a", "b", "why"), **TWO, "label": 1},
        pair("so", "no", conversation("a", "b", "why")),
    ),
    (
        "two lists",
        "ranked",
        {"prompt": "why", "responses": ["so", "no"], "scores": [0, 1.5], "weight": 2, "target": "hm"},
        ranked("so", "no", scores=[0.0, 1.5], weight=2.0, target=answer("hm")),
    ),
    (
        "lists of messages",
        "ranked",
        {"messages": WHY, "responses": [answer("so"), answer("no")[0], "hm"], "scores": [1, 2, 2]},
        ranked("so", "no", "hm", scores=[1.0, 2.0, 2.0]),
    ),
    ("objects", "ranked", KO, ranked("so", "no", scores=[-1.5, 2.0])),
    (
        "objects of other names",
        "ranked",
        {"prompt": "why", "responses": [{"text": "so", "score": 1}, {"content": "no", "score": 0}]},
        ranked("so", "no", scores=[1.0, 0.0]),
    ),
    (
        "messages with scores",
        "ranked",
        {"prompt": "why", "responses": [{**answer("so")[0], "score": 1}, {"from": "gpt", "value": "no", "score": 0}]},
        ranked("so", "no", scores=[1.0, 0.0]),
    ),
    (
        "best first",
        "ranked",
        {"instruction": "why", "input": "", "output": ["so", "no", "hm"], "history": [["a", "b"]]},
        ranked("so", "no", "hm", scores=[-0.0, -1.0, -2.0], prompt=conversation("a", "b", "why")),
    ),
    ("best message first", "ranked", {"prompt": "why", "responses": answer("so") + answer("no")},
     ranked("so", "no", scores=[-0.0, -1.0])),
    (
        "responses before output",
        "ranked",
        {"instruction": "why", "output": "the reference", "responses": ["so", "no"], "scores": [1, 2]},
        ranked("so", "no", scores=[1.0, 2.0]),
    ),
    (
        "candidates of several turns",
        "ranked",
        {"prompt": "why", "responses": [answer("so", "how", "thus"), answer("no")], "scores": [1, 2]},
        Ranked(5, WHY, [answer("so", "how", "thus"), answer("no")], [1.0, 2.0]),
    ),
    (
        "an empty target is none",
        "ranked",
        {"prompt": "why", "responses": ["so", "no"], "scores": [0, 1], "target": " "},
        ranked("so", "no", scores=[0.0, 1.0]),
    ),
    ("two turns", "mt_bench", BENCH, TWO_TURNS),
    ("prompt and label", "unpaired", {"prompt": "why", "completion": "so", "label": True},
     Unpaired(5, WHY, answer("so"), True)),
    ("number", "unpaired", {"prompt": "why", "completion": "so", "label": 0, "weight": 3},
     Unpaired(5, WHY, answer("so"), False, 3.0)),
    ("as in a CSV", "unpaired", {"prompt": "why", "completion": "so", "label": "False"},
     Unpaired(5, WHY, answer("so"), False)),
    (
        "the last answer is judged",
        "unpaired",
        {"messages": [SYSTEM, *conversation("a", "b", "why", "so")], "label": False},
        Unpaired(5, [SYSTEM, *conversation("a", "b", "why")], answer("so"), False),
    ),
    ("sharegpt", "unpaired", {"conversations": conversation("why", "so"), "label": 1},
     Unpaired(5, WHY, answer("so"), True)),
    ("alpaca", "unpaired", {"instruction": "add", "input": "1 2", "output": "3", "label": True},
     Unpaired(5, conversation("add\n\n1 2"), answer("3"), True)),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "expected"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD])
def test_rows_become_records(format: Any, row: dict[str, Any], expected: Any) -> None:
    assert parse_row(format, row, {}, number=5) == expected


R = {"prompt": "why", "responses": ["so", "no"]}

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": -1}, "`margin` is not a number of at least 0"),
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": True}, "`margin` is not a number"),
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": "z", "target": 3}, "`target` is a number, not text"),
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": "z", "target": conversation("a", "b")}, "a turn of the user"),
    ("labelled_pairs", {**TWO, "label": 1}, "no column `prompt`"),
    ("labelled_pairs", {"input": "x", "output_1": "y", "label": 1}, "no column `output_2`"),
    ("labelled_pairs", {"input": "x", **TWO}, "no column `label`"),
    ("labelled_pairs", {"input": "x", **TWO, "label": 3}, "`label` is not 1 or 2, or 0 or 1.5 for a tie"),
    ("labelled_pairs", {"input": "x", **TWO, "label": "A"}, "`label` is not 1 or 2"),
    ("labelled_pairs", {"input": "x", **TWO, "preference": True}, "`preference` is not 1 or 2"),
    ("labelled_pairs", {**VOTED, "annotator1": 1, "annotator2": 0.5}, "`annotator2` is not 1 or 2"),
    ("labelled_pairs", {**VOTED, "response1": True, "annotator1": 1}, "`response1` is true or false, not text"),
    ("ranked", {"responses": ["so", "no"], "scores": [1, 2]}, "no column `prompt`"),
    ("ranked", {"prompt": "why"}, "no column `responses`"),
    ("ranked", {"prompt": "why", "responses": "so"}, "`responses` is text, not a list"),
    ("ranked", {"instruction": "why", "output": "so"}, "`output` is text, not a list"),
    ("ranked", {"prompt": "why", "responses": []}, "`responses` is an empty list"),
    ("ranked", {**R, "scores": [1]}, "`scores` and `responses` differ in length"),
    ("ranked", {**R, "scores": None}, "`scores` is null, not a list"),
    ("ranked", {**R, "scores": [1, "2"]}, "`scores` has text, not a number"),
    ("ranked", {**R, "scores": [1, True]}, "`scores` has true or false, not a number"),
    ("ranked", {**R, "scores": [1, float("inf")]}, "`scores` has an infinite number"),
    ("ranked", {"prompt": "why", "responses": ["so", 3], "scores": [1, 2]}, "`responses` is a number, not text or"),
    ("ranked", {"prompt": "why", "responses": [conversation("x"), "y"], "scores": [1, 2]}, "a turn of the user"),
    ("ranked", {"prompt": "why", "responses": [answer("x", "y"), "y"], "scores": [1, 2]}, "does not end with the"),
    ("ranked", {"prompt": "why", "responses": [{"response": "so"}, {"response": "no"}]}, "has `score`"),
    ("ranked", {"prompt": "why", "responses": [{"answer": "so", "score": 1}]}, "a candidate of `responses` has no"),
    ("ranked", {"messages": conversation("x", "y"), "responses": ["so", "no"]}, "a turn of the assistant after the"),
    ("mt_bench", {"turns": ["why"], "candidates": ["so"]}, "a candidate of `candidates` is text, not an object"),
    ("mt_bench", {**BENCH, "turns": ["why"]}, "the `turns` of a candidate are not one for each question"),
    ("mt_bench", {"turns": ["x"], "candidates": [{"turns": ["y"]}]}, "the `scores` of a candidate are not one for"),
    ("mt_bench", {"turns": [1], "candidates": []}, "`turns` is a number, not text"),
    ("unpaired", {"prompt": "x", "completion": "y"}, "no column `label`"),
    ("unpaired", {"prompt": "x", "completion": "y", "label": None}, "`label` is not true or false"),
    ("unpaired", {"prompt": "x", "completion": "y", "label": 2}, "`label` is not true or false"),
    ("unpaired", {"prompt": "x", "completion": "y", "label": "good"}, "`label` is not true or false"),
    ("unpaired", {"prompt": "x", "label": True}, "no column `completion`"),
    ("unpaired", {"messages": answer("x"), "label": True}, "`messages` has no prompt"),
    ("unpaired", {"messages": conversation("x", "y", "z"), "label": True}, "`messages` does not end with the assist"),
    ("unpaired", {"messages": conversation("x") + conversation("y", "z"), "label": True}, "a turn of the user after"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "reason"), BAD)
def test_malformed_rows_are_told(format: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(format, row, {})
    assert reason in caught.value.reason


DROPPED: list[tuple[str, dict[str, Any], str]] = [
    ("labelled_pairs", {"input": "x", **TWO, "preference": 0}, "tie"),
    ("labelled_pairs", {"input": "x", **TWO, "preference": 1.5}, "tie"),
    ("labelled_pairs", {"input": "x", **TWO, "preference": None}, "no judgement"),
    ("labelled_pairs", {"input": "x", **TWO, "label": ""}, "no judgement"),
    ("labelled_pairs", {**VOTED, "annotator1": 0, "annotator2": 0, "annotator3": 1}, "tie"),
    ("labelled_pairs", {**VOTED, "annotator1": 0, "annotator2": 2, "annotator3": 1}, "no majority"),
    ("labelled_pairs", {**VOTED, "annotator1": 2, "annotator2": 1}, "no majority"),
    ("labelled_pairs", {**VOTED, "response2": "", "annotator1": 1}, "empty completion"),
    ("labelled_pairs", {**VOTED, "response2": "so", "annotator1": 1}, "chosen and rejected are the same"),
    ("ranked", {"prompt": " ", "responses": ["so", "no"], "scores": [1, 2]}, "empty prompt"),
    ("ranked", {**R, "scores": [1, 1.0]}, "all candidates tied"),
    ("ranked", {"prompt": "why", "responses": ["so"]}, "fewer than two candidates"),
    ("ranked", {"prompt": "why", "responses": ["so", "so"]}, "fewer than two candidates"),
    ("ranked", {"prompt": "why", "responses": ["so", " "]}, "fewer than two candidates"),
    ("ranked", {**R, "scores": [None, 2]}, "fewer than two candidates"),
    ("ranked", {**R, "scores": [float("nan"), 2]}, "fewer than two candidates"),
    ("mt_bench", {"turns": ["x", "y"], "candidates": [
        {"turns": ["a", "b"], "scores": [4, 6]}, {"turns": ["c", "d"], "scores": [5, 5]}]}, "all candidates tied"),
    ("mt_bench", {"turns": ["x"], "candidates": [
        {"turns": ["a"], "scores": [-1]}, {"turns": ["c"], "scores": [5]}]}, "fewer than two candidates"),
    ("unpaired", {"prompt": "x", "completion": " ", "label": True}, "empty completion"),
    ("unpaired", {"messages": conversation("", "y"), "label": True}, "empty prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "rule"), DROPPED)
def test_rows_with_nothing_to_learn_from_are_dropped(format: Any, row: dict[str, Any], rule: str) -> None:
    parser = Parser(format)
    with pytest.raises(Dropped) as caught:
        parser.parse(0, row)
    assert caught.value.rule == rule
    assert not any("left off" in noted for noted in parser.noted), "the row is told as a whole"


def test_candidates_that_say_nothing_new_are_left_off_and_noted() -> None:
    parser = Parser("ranked")
    row = {"prompt": "why", "responses": ["so", "", "so", "no", "hm"], "scores": [1, 4, 1, 2, None]}
    assert parser.parse(5, row) == ranked("so", "no", scores=[1.0, 2.0])
    assert parser.noted == {
        "candidate left off: empty completion": 1,
        "candidate left off: said by an earlier one": 1,
        "candidate left off: no score": 1,
    }


@pytest.mark.parametrize(
    ("responses", "scores", "expected"),
    [
        (["so", "no", "so"], [1, 2, 5], [3.0, 2.0]),
        (["so", "no", "so", "so"], [1, 2, 1, 4], [2.0, 2.0]),
        (["so", "no", "so"], [None, 2, 5], [2.0, 5.0]),
        (["so", "so", "no"], None, [-0.5, -2.0]),
        (["so", "no", "so"], None, [-1.0, -1.0]),
    ],
    ids=["better after all", "a tie", "judged once", "best first", "first and last"],
)
def test_an_answer_that_was_judged_twice_has_the_mean_of_its_scores(
    responses: list[str], scores: list[float | None] | None, expected: list[float]
) -> None:
    parser = Parser("ranked")
    row = {"prompt": "why", "responses": responses} | ({} if scores is None else {"scores": scores})
    if len(set(expected)) == 1:
        with pytest.raises(Dropped, match="all candidates tied"):
            parser.parse(0, row)
        return
    said = ["no", "so"] if scores and scores[0] is None else ["so", "no"]
    assert parser.parse(5, row) == ranked(*said, scores=expected)
    assert parser.noted["answer with several scores has their mean"] == (0 if scores and None in scores else 1)


def test_lists_without_scores_are_noted() -> None:
    parser = Parser("ranked")
    parser.parse(0, {"prompt": "why", "responses": ["so", "no"]})
    assert parser.noted == {"list without scores read as best first": 1}


def test_a_judgement_of_several_scores_is_named_by_the_columns() -> None:
    parser = Parser("ranked", CANDIDATES)
    assert parser.parse(5, ALPACA_EVAL) == ranked("so", "hm", scores=[1e-9, 0.9])
    assert parser.noted == {"candidate left off: no score": 1}
    with pytest.raises(BadRow, match="no candidate of `responses` has `jugde`"):
        Parser("ranked", {"responses": "candidates", "score": "jugde"}).parse(5, ALPACA_EVAL)
    with pytest.raises(BadRow, match="a candidate of `responses` has no `said`"):
        Parser("ranked", CANDIDATES | {"response": "said"}).parse(5, ALPACA_EVAL)


def test_a_failed_judgement_of_one_turn_leaves_the_candidate_off() -> None:
    parser = Parser("mt_bench")
    failed = {"turns": ["hm", "hm"], "scores": [9, -1]}
    assert parser.parse(5, BENCH | {"candidates": [*BENCH["candidates"], failed]}) == TWO_TURNS
    assert parser.noted == {"candidate left off: no score": 1}


@pytest.mark.parametrize(
    ("format", "row", "columns"),
    [
        ("labelled_pairs", {"q": "why", "a": "so", "b": "no", "winner": 1},
         {"instruction": "q", "output_1": "a", "output_2": "b", "label": "winner"}),
        ("ranked", {"q": "why", "texts": ["so", "no"], "points": [1, 2]},
         {"prompt": "q", "responses": "texts", "scores": "points"}),
        ("mt_bench", {"questions": ["why"], "answers": [
            {"turns": ["so"], "scores": [1]}, {"turns": ["no"], "scores": [2]}]},
         {"turns": "questions", "candidates": "answers"}),
        ("unpaired", {"talk": conversation("why", "so"), "kto_tag": True}, {"messages": "talk", "label": "kto_tag"}),
    ],
)  # fmt: skip
def test_columns_are_read_under_their_names(format: Any, row: dict[str, Any], columns: dict[str, str]) -> None:
    assert parse_row(format, row, columns).prompt == WHY  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("labelled_pairs", {"input": "why", **TWO, "label": 1}),
        ("ranked", KO),
        ("mt_bench", BENCH),
        ("unpaired", {"prompt": "why", "completion": "so", "label": True}),
    ],
)
def test_a_system_message_is_put_before_prompts_that_have_none(format: Any, row: dict[str, Any]) -> None:
    record = Parser(format, {}, "be kind").parse(0, row)
    assert record.prompt == [SYSTEM, *WHY]  # type: ignore[union-attr]
