"""Every format's rows: what they become, which are malformed, which are dropped."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import Parser, as_prompt, parse_row
from align.data.records import BadRow, Conversation, Dropped, Pair, Prompt, Text
from tests.data.conversations import conversation


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": each} for i, each in enumerate(contents)]


def shared(*contents: str) -> list[dict[str, str]]:
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": each} for i, each in enumerate(contents)]


SYSTEM = {"role": "system", "content": "be kind"}
ANSWER = said("", "so")[1:]
OTHER = said("", "no")[1:]

GOOD: list[tuple[str, str, dict[str, Any], Any]] = [
    ("text", "text", {"text": " the sea\n"}, Text(5, " the sea\n")),
    ("weighted", "text", {"text": "sea", "weight": "0.5"}, Text(5, "sea", 0.5)),
    (
        "alpaca",
        "alpaca",
        {"instruction": "add", "input": "1 2", "output": "3"},
        Conversation(5, said("add\n\n1 2", "3")),
    ),
    ("no column input", "alpaca", {"instruction": "add", "output": "3"}, Conversation(5, said("add", "3"))),
    ("null input", "alpaca", {"instruction": "add", "input": None, "output": "3"}, Conversation(5, said("add", "3"))),
    (
        "history and system",
        "alpaca",
        {"instruction": "how", "output": "so", "history": [["why", "because"]], "system": "be kind"},
        Conversation(5, [SYSTEM, *said("why", "because", "how", "so")]),
    ),
    ("messages", "messages", {"messages": [SYSTEM, *said("why", "so")]}, Conversation(5, [SYSTEM, *said("why", "so")])),
    (
        "other keys",
        "messages",
        {"messages": [{**m, "id": 1, "tool_calls": None} for m in said("why", "so")]},
        Conversation(5, said("why", "so")),
    ),
    (
        "capitals",
        "messages",
        {"messages": [{"role": "User", "content": "why"}, *ANSWER]},
        Conversation(5, said("why", "so")),
    ),
    ("unanswered end", "messages", {"messages": said("why", "so", "how")}, Conversation(5, said("why", "so"))),
    ("sharegpt", "sharegpt", {"conversations": shared("why", "so"), "tools": ""}, Conversation(5, said("why", "so"))),
    (
        "sharegpt system",
        "sharegpt",
        {"conversations": shared("why", "so"), "system": "be kind"},
        Conversation(5, [SYSTEM, *said("why", "so")]),
    ),
    (
        "prompt_completion",
        "prompt_completion",
        {"prompt": "why", "completion": "so"},
        Conversation(5, said("why", "so")),
    ),
    (
        "as lists",
        "prompt_completion",
        {"prompt": [SYSTEM, *said("why")], "completion": ANSWER},
        Conversation(5, [SYSTEM, *said("why", "so")]),
    ),
    ("pairs", "pairs", {"prompt": "why", "chosen": "so", "rejected": "no"}, Pair(5, said("why"), ANSWER, OTHER)),
    (
        "weighted pair",
        "pairs",
        {"prompt": "why", "chosen": "so", "rejected": "no", "weight": 2},
        Pair(5, said("why"), ANSWER, OTHER, 2.0),
    ),
    (
        "pairs as lists",
        "pairs",
        {"prompt": said("a", "b", "why"), "chosen": ANSWER, "rejected": OTHER},
        Pair(5, said("a", "b", "why"), ANSWER, OTHER),
    ),
    (
        "whole conversations",
        "pairs",
        {"chosen": said("why", "so"), "rejected": said("why", "no")},
        Pair(5, said("why"), ANSWER, OTHER),
    ),
    (
        "the prompt said again",
        "pairs",
        {"prompt": "why", "chosen": said("why", "so"), "rejected": said("why", "no")},
        Pair(5, said("why"), ANSWER, OTHER),
    ),
    (
        "a long shared beginning",
        "pairs",
        {"chosen": [SYSTEM, *said("a", "b", "why", "so")], "rejected": [SYSTEM, *said("a", "b", "why", "no")]},
        Pair(5, [SYSTEM, *said("a", "b", "why")], ANSWER, OTHER),
    ),
    (
        "parting after an answer",
        "pairs",
        {"chosen": said("why", "so", "how", "thus"), "rejected": said("why", "so", "when", "now")},
        Pair(5, said("why"), said("", "so", "how", "thus")[1:], said("", "so", "when", "now")[1:]),
    ),
    (
        "continued for several turns",
        "pairs",
        {"chosen": said("why", "so", "how", "thus"), "rejected": said("why", "no")},
        Pair(5, said("why"), said("", "so", "how", "thus")[1:], OTHER),
    ),
    (
        "llama-factory",
        "pairs",
        {
            "conversations": shared("why"),
            "chosen": {"from": "gpt", "value": "so"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        Pair(5, said("why"), ANSWER, OTHER),
    ),
    (
        "better and worse",
        "pairs",
        {"instruction": "why", "input": "", "output": ["so", "no"]},
        Pair(5, said("why"), ANSWER, OTHER),
    ),
    (
        "alpaca pair",
        "pairs",
        {"instruction": "why", "chosen": "so", "rejected": "no", "output": 1},
        Pair(5, said("why"), ANSWER, OTHER),
    ),
    ("prompt", "prompts", {"prompt": "why"}, Prompt(5, said("why"))),
    ("prompt as list", "prompts", {"prompt": said("why", "so", "how")}, Prompt(5, said("why", "so", "how"))),
    (
        "prompt of messages",
        "prompts",
        {"messages": said("why", "so", "how", "thus")},
        Prompt(5, said("why", "so", "how")),
    ),
    ("prompt of sharegpt", "prompts", {"conversations": shared("why", "so")}, Prompt(5, said("why"))),
    (
        "prompt of alpaca",
        "prompts",
        {"instruction": "add", "input": "1 2", "output": "3"},
        Prompt(5, said("add\n\n1 2")),
    ),
]


@pytest.mark.parametrize(("format", "row", "expected"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD])
def test_rows_become_records(format: Any, row: dict[str, Any], expected: Any) -> None:
    assert parse_row(format, row, {}, number=5) == expected


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"txt": "x"}, "no column `text`"),
    ("text", {"text": None}, "`text` is null, not text"),
    ("text", {"text": 3}, "`text` is a number, not text"),
    ("text", {"text": "\ud83d"}, "`text` has broken unicode"),
    ("text", {"text": "x", "weight": 0}, "`weight` is not a positive number"),
    ("text", {"text": "x", "weight": True}, "`weight` is not a positive number"),
    ("text", {"text": "x", "weight": float("nan")}, "`weight` is not a positive number"),
    ("text", {"text": "x", "weight": None}, "`weight` is not a positive number"),
    ("alpaca", {"instruction": "x", "output": ["y"]}, "`output` is a list, not text"),
    ("alpaca", {"instruction": "x", "input": {}, "output": "y"}, "`input` is an object, not text"),
    ("alpaca", {"instruction": "x", "output": "y", "history": "z"}, "`history` is text, not a list"),
    ("alpaca", {"instruction": "x", "output": "y", "history": [["z"]]}, "`history` is not a list of [user, assistant]"),
    ("messages", {"messages": "why"}, "`messages` is text, not a list of messages"),
    ("prompts", {"prompt": 1}, "`prompt` is a number, not text or a list of messages"),
    ("messages", {"messages": []}, "`messages` is an empty list"),
    ("messages", {"messages": ["why"]}, "a message of `messages` is text, not an object"),
    ("messages", {"messages": [{"role": "user"}]}, "neither `role` and `content` nor"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
    ("messages", {"messages": [{"role": None, "content": "x"}]}, "the role None"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "`messages.content` is a list, not text",
    ),
    (
        "messages",
        {"messages": [*said("x"), {"role": "assistant", "content": "", "tool_calls": [1]}]},
        "has `tool_calls`",
    ),
    ("messages", {"messages": ANSWER}, "a turn of the assistant at the beginning"),
    ("messages", {"messages": said("x") * 2}, "a turn of the user after the user's turn"),
    ("messages", {"messages": [*said("x", "y"), SYSTEM]}, "a turn of the system after the assistant's turn"),
    ("sharegpt", {"conversations": shared("x", "y"), "tools": "[{}]"}, "`tools` are not supported"),
    ("prompt_completion", {"prompt": "x"}, "no column `completion`"),
    ("prompt_completion", {"prompt": "x", "completion": said("y")}, "a turn of the user after the user's turn"),
    ("pairs", {"prompt": "x", "chosen": "y"}, "no column `rejected`"),
    ("pairs", {"chosen": "y", "rejected": "z"}, "no prompt"),
    ("pairs", {"chosen": said("x", "y"), "rejected": said("w", "z")}, "no prompt"),
    ("pairs", {"prompt": "w", "chosen": said("x", "y"), "rejected": said("x", "z")}, "do not continue `prompt`"),
    (
        "pairs",
        {"prompt": "x", "chosen": said("", "y", "z")[1:], "rejected": "z"},
        "`chosen` does not end with the assistant",
    ),
    ("pairs", {"instruction": "x", "output": ["y"]}, "`output` is not a list of [better, worse]"),
    ("prompts", {"question": "x"}, "no column `prompt`"),
]


@pytest.mark.parametrize(("format", "row", "reason"), BAD)
def test_malformed_rows_are_told(format: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(format, row, {})
    assert reason in caught.value.reason


DROPPED: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"text": " \n"}, "empty text"),
    ("alpaca", {"instruction": "x", "output": ""}, "empty completion"),
    ("alpaca", {"instruction": " ", "input": "", "output": "y"}, "empty prompt"),
    ("messages", {"messages": said("x", " ")}, "empty completion"),
    ("messages", {"messages": said("x", "y", "", "z")}, "empty prompt"),
    ("messages", {"messages": [SYSTEM, *said("x")]}, "no assistant turn"),
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": "\t"}, "empty completion"),
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
    ("pairs", {"chosen": said("x", "y"), "rejected": said("x", "y")}, "chosen and rejected are the same"),
    ("prompts", {"prompt": ""}, "empty prompt"),
    ("prompts", {"messages": [SYSTEM]}, "empty prompt"),
]


@pytest.mark.parametrize(("format", "row", "rule"), DROPPED)
def test_rows_with_nothing_to_train_on_are_dropped(format: Any, row: dict[str, Any], rule: str) -> None:
    with pytest.raises(Dropped) as caught:
        parse_row(format, row, {})
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    "given",
    [
        "No input",
        "<noinput>",
        "N/A",
        "no input.",
        "`<noinput>`",
        "(No Input)",
        "No input required.",
        "None",
        "\\<noinput\\>",
        "입력 없음",
        "<입력 없음>",
        "입력이 없습니다.",
        "입력이 필요하지 않습니다.",
        '"<노인입력>"',
    ],
)
def test_inputs_that_say_there_is_none(given: str) -> None:
    parser = Parser("alpaca")
    record = parser.parse(0, {"instruction": "add", "input": given, "output": "3"})
    assert record == Conversation(0, conversation("add", "3"))
    assert parser.noted == {"input that says there is none": 1}


@pytest.mark.parametrize(
    "given", ["no", "the boy <noinput> the ball", "none of them", "input", "Canada", "<noinput> 8", "-"]
)
def test_inputs_that_say_something(given: str) -> None:
    record = parse_row("alpaca", {"instruction": "add", "input": given, "output": "3"}, {})
    assert record == Conversation(0, conversation(f"add\n\n{given}", "3"))


def test_columns_are_read_under_their_names() -> None:
    row = {"question": "why", "reply": "so", "instruction": "not this", "weight": "nor this"}
    columns = {"instruction": "question", "output": "reply", "weight": "w"}
    assert parse_row("alpaca", row, columns) == Conversation(0, conversation("why", "so"))
    with pytest.raises(BadRow, match="no column `reply`"):
        parse_row("alpaca", {"question": "why", "output": "so"}, columns)


def test_a_system_message_is_put_before_conversations_that_have_none() -> None:
    parser = Parser("messages", {}, "be kind")
    assert parser.parse(0, {"messages": said("why", "so")}) == Conversation(0, [SYSTEM, *said("why", "so")])
    own = {"role": "system", "content": "be rude"}
    assert parser.parse(0, {"messages": [own, *said("why", "so")]}) == Conversation(0, [own, *said("why", "so")])
    pair = Parser("pairs", {}, "be kind").parse(0, {"prompt": "why", "chosen": "so", "rejected": "no"})
    assert pair.prompt == [SYSTEM, *said("why")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Conversation(4, said("a", "b", "c", "d")), said("a", "b", "c")),
        (Pair(4, said("a", "b", "c"), ANSWER, OTHER), said("a", "b", "c")),
        (Prompt(4, said("a", "b", "c")), said("a", "b", "c")),
    ],
)
def test_a_prompt_is_what_comes_before_the_last_answer(record: Any, expected: list[dict[str, str]]) -> None:
    assert as_prompt(record) == Prompt(4, expected)
