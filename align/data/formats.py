"""From the columns of a row to a record: one function per format, and one table of what each may read.

A row that cannot be read as its format is a `BadRow`; one that is well-formed but must not be trained on is `Dropped`.
Texts are taken as they are: nothing is stripped or normalised.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.records import BadRow, Conversation, Dropped, Message, Pair, Prompt, Record, Role, Text
from align.data.sources import type_word
from align.spec.data import FIELDS_OF_FORMAT, Format

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""What a role is called in the wild, in small letters -> what it is."""

UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "weight")
"""Keys of a message that change what it means, so that leaving them out would be wrong."""

NO_INPUT = re.compile(
    r"[\W_]*(no[\W_]*input(\s+(is\s+)?(needed|required|necessary|provided|given))?|n/a|none"
    r"|입력\s*없음|입력이\s*(없습니다|필요하지\s*않습니다)|노인\s*입력)[\W_]*",
    re.IGNORECASE,
)
"""Inputs that say there is none. The last one is what machine translation made of `<noinput>`: "elderly input"."""

LONGEST_NO_INPUT = 40
"""Characters; longer inputs are inputs."""


@dataclass
class Parser:
    """Reads rows of one format.

    Attributes:
        format: The format.
        columns: Field -> column, where they differ.
        system: A system message for conversations that have none.
        noted: What was read in another way than it is written -> how often.
    """

    format: Format
    columns: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    noted: Counter[str] = field(default_factory=Counter)

    def parse(self, number: int, row: dict[str, Any]) -> Record:
        """The record of a row.

        Raises:
            BadRow: The row is malformed.
            Dropped: The row is well-formed and has nothing to train on.
        """
        column_of = {name: self.columns.get(name, name) for name in FIELDS_OF_FORMAT[self.format].names}
        columns = Columns({name: row[column] for name, column in column_of.items() if column in row}, self)
        return _PARSERS[self.format](number, columns)


def parse_row(format: Format, row: dict[str, Any], columns: dict[str, str], number: int = 0) -> Record:
    """`Parser.parse` for a single row."""
    return Parser(format, columns).parse(number, row)


@dataclass(frozen=True)
class Columns:
    """The fields of one row, taken by type."""

    values: dict[str, Any]
    parser: Parser

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise BadRow(f"no column `{self.parser.columns.get(name, name)}`")
        return self.values[name]

    def text(self, name: str) -> str:
        return as_text(self.get(name), name)

    def weight(self) -> float:
        if "weight" not in self.values:
            return 1.0
        try:
            weight = float(self.values["weight"])
        except (TypeError, ValueError):
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)) or isinstance(self.values["weight"], bool):
            raise BadRow("`weight` is not a positive number")
        return weight

    def messages(self, name: str, text_of: Role | None = None) -> list[Message]:
        """A list of messages, or a single one; with `text_of` also a text, which that role says."""
        value = self.get(name)
        if isinstance(value, str) and text_of:
            return [{"role": text_of, "content": as_text(value, name)}]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            raise BadRow(f"`{name}` is {type_word(value)}, not {'text or ' if text_of else ''}a list of messages")
        if not value:
            raise BadRow(f"`{name}` is an empty list")
        return [as_message(each, name) for each in value]

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Put the row's own system message, or else the source's, before a conversation that has none."""
        own = self.text("system") if "system" in self else ""
        system = own or self.parser.system
        if messages[0]["role"] == "system" or not system:
            return messages
        return [{"role": "system", "content": system}, *messages]

    def note(self, what: str) -> None:
        self.parser.noted[what] += 1


def as_text(value: Any, name: str) -> str:
    """A text that can be encoded; `name` is what a complaint calls it."""
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is {type_word(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"`{name}` has broken unicode") from None
    return value


def as_message(value: Any, name: str) -> Message:
    """A message, from `role` and `content` or from `from` and `value`."""
    if not isinstance(value, dict):
        raise BadRow(f"a message of `{name}` is {type_word(value)}, not an object")
    for key in UNSUPPORTED_KEYS:
        if value.get(key) is not None:
            raise BadRow(f"a message of `{name}` has `{key}`, which is not supported")
    for role, content in (("role", "content"), ("from", "value")):
        if role in value and content in value:
            known = ROLES.get(value[role].lower()) if isinstance(value[role], str) else None
            if known is None:
                raise BadRow(f"a message of `{name}` has the role {value[role]!r}")
            return {"role": known, "content": as_text(value[content], f"{name}.{content}")}  # type: ignore[typeddict-item]
    raise BadRow(f"a message of `{name}` has neither `role` and `content` nor `from` and `value`")


def check_turns(messages: Sequence[Message], name: str) -> None:
    """User and assistant in alternation, after at most one system message.

    Raises:
        BadRow: The order is another.
        Dropped: A turn is empty.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            before = f"after the {turns[i - 1]['role']}'s turn" if i else "at the beginning"
            raise BadRow(f"`{name}` has a turn of the {message['role']} {before}")
        if not message["content"].strip():
            raise Dropped("empty completion" if expected == "assistant" else "empty prompt")


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


def _alpaca_prompt(columns: Columns) -> list[Message]:
    messages: list[Message] = []
    history = columns.values.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"`history` is {type_word(history)}, not a list")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("`history` is not a list of [user, assistant]")
        messages.append({"role": "user", "content": as_text(turn[0], "history")})
        messages.append({"role": "assistant", "content": as_text(turn[1], "history")})
    instruction = columns.text("instruction")
    given = columns.text("input") if "input" in columns else ""
    if len(given) < LONGEST_NO_INPUT and NO_INPUT.fullmatch(given):
        columns.note("input that says there is none")
        given = ""
    prompt = "\n\n".join(part for part in (instruction, given) if part.strip())
    return [*messages, {"role": "user", "content": prompt}]


def _alpaca(number: int, columns: Columns) -> Conversation:
    answer: Message = {"role": "assistant", "content": columns.text("output")}
    return _conversation(number, columns, [*_alpaca_prompt(columns), answer], "history")


def _messages(number: int, columns: Columns) -> Conversation:
    return _conversation(number, columns, columns.messages("messages"), "messages")


def _sharegpt(number: int, columns: Columns) -> Conversation:
    if columns.values.get("tools"):
        raise BadRow("`tools` are not supported")
    return _conversation(number, columns, columns.messages("conversations"), "conversations")


def _prompt_completion(number: int, columns: Columns) -> Conversation:
    messages = columns.messages("prompt", "user") + columns.messages("completion", "assistant")
    return _conversation(number, columns, messages, "prompt + completion")


def _pair(number: int, columns: Columns) -> Pair:
    chosen, rejected = _sides(columns)
    name = next((name for name in ("prompt", "conversations", "instruction") if name in columns), None)
    asked = _alpaca_prompt(columns) if name == "instruction" else columns.messages(name, "user") if name else []
    shared = _shared_prefix(chosen, rejected)
    if shared:
        # Both sides are whole conversations; a prompt beside them only says again how they begin.
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        said, asked = ([m for m in each if m["role"] != "system"] for each in (prompt, asked))
        if asked not in (said[: len(asked)], said[len(said) - len(asked) :]):
            raise BadRow(f"`chosen` and `rejected` do not continue `{name}`")
    elif asked:
        prompt = asked
    else:
        raise BadRow("no prompt: no column has one, and `chosen` and `rejected` do not begin alike")
    prompt = columns.with_system(prompt)
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        check_turns([*prompt, *messages], f"prompt + {side}")
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"`{side}` does not end with the assistant")
    if chosen == rejected:
        raise Dropped("chosen and rejected are the same")
    return Pair(number, prompt, chosen, rejected, columns.weight())


def _sides(columns: Columns) -> tuple[list[Message], list[Message]]:
    """Chosen and rejected, from their columns or from a list [better, worse] in `output`."""
    if "chosen" in columns or "output" not in columns:
        return columns.messages("chosen", "assistant"), columns.messages("rejected", "assistant")
    ranked = columns.get("output")
    if not isinstance(ranked, list) or len(ranked) != 2:
        raise BadRow("`output` is not a list of [better, worse]")
    better, worse = ([Message(role="assistant", content=as_text(each, "output"))] for each in ranked)
    return better, worse


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> int:
    """How many leading messages two conversations share, up to a turn that the assistant answers."""
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if a != b:
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    return shared


def _prompt(number: int, columns: Columns) -> Prompt:
    name = next((n for n in ("prompt", "messages", "conversations", "instruction") if n in columns), "prompt")
    messages = _alpaca_prompt(columns) if name == "instruction" else columns.messages(name, "user")
    messages = columns.with_system(messages)
    check_turns(messages, name)
    return as_prompt(Prompt(number, messages))


def as_prompt(record: Record) -> Prompt:
    """A record reduced to what comes before its last answer."""
    if isinstance(record, Pair):
        return Prompt(record.row, record.prompt)
    assert isinstance(record, Conversation | Prompt)
    messages = record.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise Dropped("empty prompt")
    return Prompt(record.row, messages)


_PARSERS: dict[Format, Callable[[int, Columns], Record]] = {
    "text": _text,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "pairs": _pair,
    "prompts": _prompt,
}
