"""From the columns of a row to a record: one function per format; those of preferences are in `preferences.py`.

A row that cannot be read as its format is a `BadRow`; one that is well-formed but must not be trained on is `Dropped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from align.data import preferences
from align.data.columns import Columns, check_turns
from align.data.convert import as_prompt
from align.data.records import BadRow, Conversation, Dropped, Message, Prompt, Record, Text
from align.spec.data import FIELDS_OF_FORMAT, Format


@dataclass
class Parser:
    """Reads rows of one format.

    Attributes:
        format: The format.
        columns: Field -> column, where they differ.
        system: A system message for conversations that have none.
        noted: What was read in another way than it is written -> how often.
        labels: Labels of which of two answers is better -> how often.
    """

    format: Format
    columns: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    noted: Counter[str] = field(default_factory=Counter)
    labels: Counter[float] = field(default_factory=Counter)

    def parse(self, number: int, row: dict[str, Any]) -> Record:
        """The record of a row.

        Raises:
            BadRow: The row is malformed.
            Dropped: The row is well-formed and has nothing to train on.
        """
        column_of = {name: self.columns.get(name, name) for name in FIELDS_OF_FORMAT[self.format].of_row}
        values = {name: row[column] for name, column in column_of.items() if column in row}
        return _PARSERS[self.format](number, Columns(values, self.columns, self.system, self.noted, self.labels))


def parse_row(format: Format, row: dict[str, Any], columns: dict[str, str], number: int = 0) -> Record:
    """`Parser.parse` for a single row."""
    return Parser(format, columns).parse(number, row)


def _text(number: int, columns: Columns) -> Text:
    text = columns.text("text")
    if not text.strip():
        raise Dropped("empty text")
    return Text(number, text, columns.weight())


def _conversation(number: int, columns: Columns, messages: list[Message], name: str) -> Conversation:
    messages = columns.with_system(messages)
    check_turns(messages, name)
    if all(message["role"] != "assistant" for message in messages):
        raise Dropped("no assistant turn")
    if messages[-1]["role"] == "user":
        columns.note("last user turn without an answer left off")
        messages = messages[:-1]
    return Conversation(number, messages, columns.weight())


def _alpaca(number: int, columns: Columns) -> Conversation:
    answer: Message = {"role": "assistant", "content": columns.text("output")}
    return _conversation(number, columns, [*columns.instruction(), answer], "history")


def _messages(number: int, columns: Columns) -> Conversation:
    return _conversation(number, columns, columns.messages("messages"), "messages")


def _sharegpt(number: int, columns: Columns) -> Conversation:
    if columns.values.get("tools"):
        raise BadRow("`tools` are not supported")
    return _conversation(number, columns, columns.messages("conversations"), "conversations")


def _prompt_completion(number: int, columns: Columns) -> Conversation:
    messages = columns.messages("prompt", "user") + columns.messages("completion", "assistant")
    return _conversation(number, columns, messages, "prompt + completion")


def _prompt(number: int, columns: Columns) -> Prompt:
    name = columns.first("prompt", "messages", "conversations", "instruction") or "prompt"
    messages = columns.instruction() if name == "instruction" else columns.messages(name, "user")
    messages = columns.with_system(messages)
    check_turns(messages, name)
    return as_prompt(Prompt(number, messages))


_PARSERS: dict[Format, Callable[[int, Columns], Record]] = {
    "text": _text,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "pairs": preferences.pair,
    "labelled_pairs": preferences.labelled_pair,
    "ranked": preferences.ranked,
    "mt_bench": preferences.mt_bench,
    "samples": preferences.samples,
    "unpaired": preferences.unpaired,
    "prompts": _prompt,
}
