"""The fields of one row, taken by type: texts, messages, numbers, and the prompt that they make.

Whatever is of another type than its format says is a `BadRow`. Texts are taken as they are: nothing is stripped or
normalised.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.records import EMPTY, BadRow, Dropped, Message, Role
from align.data.sources import type_word

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


@dataclass(frozen=True)
class Columns:
    """The fields of one row.

    Attributes:
        values: Field -> what stands there, for the fields that the row has.
        names: Field -> column, where they differ.
        system: A system message for conversations that have none.
        noted: What was read in another way than it is written -> how often.
        labels: Labels of which of two answers is better -> how often.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]
    system: str | None
    noted: Counter[str]
    labels: Counter[float]

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def first(self, *names: str) -> str | None:
        """The first of these fields that the row has."""
        return next((name for name in names if name in self), None)

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise BadRow(f"no column `{self.names.get(name, name)}`")
        return self.values[name]

    def items(self, name: str) -> list[Any]:
        """A list that has something in it."""
        value = self.get(name)
        if not isinstance(value, list):
            raise BadRow(f"`{name}` is {type_word(value)}, not a list")
        if not value:
            raise BadRow(f"`{name}` is an empty list")
        return value

    def text(self, name: str) -> str:
        return as_text(self.get(name), name)

    def weight(self) -> float:
        weight = self._number("weight", 1.0)
        if weight is None or weight == 0:
            raise BadRow("`weight` is not a positive number")
        return weight

    def margin(self) -> float:
        """By how much the better of two is better."""
        margin = self._number("margin", 0.0)
        if margin is None:
            raise BadRow("`margin` is not a number of at least 0")
        return margin

    def _number(self, name: str, absent: float) -> float | None:
        """A finite number that is not negative, also as text as in a CSV; None for anything else."""
        if name not in self.values:
            return absent
        try:
            value = float(self.values[name])
        except (TypeError, ValueError):
            return None
        return value if value >= 0 and math.isfinite(value) and not isinstance(self.values[name], bool) else None

    def messages(self, name: str, text_of: Role | None = None) -> list[Message]:
        """A list of messages, or a single one; with `text_of` also a text, which that role says."""
        return as_messages(self.get(name), name, text_of)

    def prompt(self, *fields: str) -> tuple[str | None, list[Message]]:
        """What is asked, and the first of `fields` that the row has, which says it: `instruction`, or messages."""
        name = self.first(*fields)
        if name is None:
            return None, []
        return name, self.instruction() if name == "instruction" else self.messages(name, "user")

    def instruction(self) -> list[Message]:
        """The prompt of `instruction`, `input` and `history`."""
        messages: list[Message] = []
        history = self.values.get("history") or []
        if not isinstance(history, list):
            raise BadRow(f"`history` is {type_word(history)}, not a list")
        for turn in history:
            if not isinstance(turn, list) or len(turn) != 2:
                raise BadRow("`history` is not a list of [user, assistant]")
            messages.append({"role": "user", "content": as_text(turn[0], "history")})
            messages.append({"role": "assistant", "content": as_text(turn[1], "history")})
        instruction = self.text("instruction")
        given = self.text("input") if "input" in self else ""
        if len(given) < LONGEST_NO_INPUT and NO_INPUT.fullmatch(given):
            self.note("input that says there is none")
            given = ""
        prompt = "\n\n".join(part for part in (instruction, given) if part.strip())
        return [*messages, {"role": "user", "content": prompt}]

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Put the row's own system message, or else the source's, before a conversation that has none."""
        own = self.text("system") if "system" in self else ""
        system = own or self.system
        if messages[0]["role"] == "system" or not system:
            return messages
        return [{"role": "system", "content": system}, *messages]

    def target(self, prompt: Sequence[Message]) -> list[Message] | None:
        """The answer to stay close to, if the row has one."""
        if "target" not in self:
            return None
        target = self.messages("target", "assistant")
        try:
            check_answer(prompt, target, "target")
        except Dropped as error:
            if error.rule != EMPTY:
                raise
            self.note("empty target left off")
            return None
        return target

    def saw_label(self, value: float) -> None:
        """Remember which labels there are: only the whole file tells what a 0 means."""
        self.labels[value] += 1

    def note(self, what: str) -> None:
        self.noted[what] += 1


def as_text(value: Any, name: str) -> str:
    """A text that can be encoded; `name` is what a complaint calls it."""
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is {type_word(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"`{name}` has broken unicode") from None
    return value


def as_messages(value: Any, name: str, text_of: Role | None = None) -> list[Message]:
    """A list of messages, or a single one; with `text_of` also a text, which that role says."""
    if isinstance(value, str) and text_of:
        return [{"role": text_of, "content": as_text(value, name)}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is {type_word(value)}, not {'text or ' if text_of else ''}a list of messages")
    if not value:
        raise BadRow(f"`{name}` is an empty list")
    return [as_message(each, name) for each in value]


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
            raise Dropped(EMPTY if expected == "assistant" else "empty prompt")


def check_answer(prompt: Sequence[Message], answer: Sequence[Message], name: str) -> None:
    """A continuation of a prompt that begins and ends with the assistant.

    Raises:
        BadRow: It is another.
        Dropped: A turn is empty.
    """
    check_turns([*prompt, *answer], f"prompt + {name}")
    if answer[-1]["role"] != "assistant":
        raise BadRow(f"`{name}` does not end with the assistant")
