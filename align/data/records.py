"""What a row becomes, whatever its format: one of seven records, or a reason why it is none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, every token of which is trained. It is its own prompt: two texts share one if they are the same."""

    row: int
    text: str
    weight: float = 1.0

    @property
    def prompt(self) -> list[Message]:
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of user and assistant in alternation, after at most one system message; the last is the assistant's."""

    row: int
    messages: list[Message]
    weight: float = 1.0

    @property
    def prompt(self) -> list[Message]:
        """What comes before the first answer."""
        return before_answer(self.messages)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two continuations of it, each beginning and ending with the assistant.

    Attributes:
        margin: By how much chosen is better, where the data says so.
        target: A continuation to stay close to.
    """

    row: int
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    weight: float = 1.0
    margin: float = 0.0
    target: list[Message] | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """One prompt and two or more different continuations of it with scores, at least two of which differ.

    Attributes:
        responses: The candidates, in the order of the row.
        scores: How good each is: the higher the better, and only the order means something.
        target: A continuation to stay close to.
    """

    row: int
    prompt: list[Message]
    responses: list[list[Message]]
    scores: list[float]
    target: list[Message] | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Samples:
    """One prompt and answers to it of one turn each, of which nothing is decided yet: they may be empty or said twice.

    Attributes:
        responses: The answers, in the order of the row.
        sources: Where each comes from; empty texts where nothing says it.
        ended: Whether each ended by itself, and was not cut off.
        scores: How good each is, None where nothing says it; None for a row without scores.
        target: A continuation to stay close to.
    """

    row: int
    prompt: list[Message]
    responses: list[str]
    sources: list[str]
    ended: list[bool]
    scores: list[float | None] | None = None
    target: list[Message] | None = None


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One prompt, one continuation of it and whether that is desirable."""

    row: int
    prompt: list[Message]
    completion: list[Message]
    label: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant's next turn.

    Attributes:
        answers: What the row itself answers, each under its name; no part of what is asked.
        target: The best of these.
    """

    row: int
    messages: list[Message]
    answers: tuple[tuple[str, list[Message]], ...] = field(default=(), compare=False)
    target: list[Message] | None = field(default=None, compare=False)

    @property
    def prompt(self) -> list[Message]:
        return self.messages


Record = Text | Conversation | Pair | Ranked | Samples | Unpaired | Prompt

EMPTY = "empty completion"
NO_SCORE = "no score"
SAID_TWICE = "said by an earlier one"
TOO_FEW = "fewer than two candidates"
TIED = "all candidates tied"
NO_TARGET = "no target"
"""Why candidates, rows and records are left out, in the same words before and after the tokenizer."""


class BadRow(Exception):
    """A row that is malformed: it goes to the quarantine, and too many of them stop the run.

    Args:
        reason: What is wrong, in words that many rows can share, for it is counted.
        raw: The row as it was read, where it could not even be parsed.
    """

    def __init__(self, reason: str, raw: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.raw = raw


class Dropped(Exception):
    """A well-formed row that training could only be harmed by: it is left out and counted under its rule."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def left_off(rule: str) -> str:
    """How it is noted that a candidate was left off a list, the rest of which is used."""
    return f"candidate left off: {rule}"


def before_answer(messages: Sequence[Message]) -> list[Message]:
    """What comes before the first assistant's turn."""
    return list(takewhile(lambda message: message["role"] != "assistant", messages))


def digest(*conversations: Iterable[Message]) -> bytes:
    """16 bytes that tell conversations apart by content: the same in every process, unlike `hash`."""
    state = hashlib.blake2b(digest_size=16)
    for messages in conversations:
        for message in messages:
            content = message["content"].encode("utf-8", "surrogatepass")
            state.update(b"%s %d\0" % (message["role"].encode(), len(content)))
            state.update(content)
        state.update(b"\1")
    return state.digest()


def identity(record: Record) -> bytes:
    """Equal for records that say the same with the same weight, labels and scores."""
    said: list[list[Message]] = [record.messages if isinstance(record, Conversation | Prompt) else record.prompt]
    told: list[object] = [] if isinstance(record, Prompt | Samples) else [record.weight]
    if isinstance(record, Pair):
        said += [record.chosen, record.rejected, record.target or []]
        told.append(record.margin)
    elif isinstance(record, Ranked):
        said += [*record.responses, record.target or []]
        told.append(record.scores)
    elif isinstance(record, Samples):
        said += [[{"role": "assistant", "content": each}] for each in record.responses]
        told += [record.scores, record.sources, record.ended]
    elif isinstance(record, Unpaired):
        said.append(record.completion)
        told.append(record.label)
    return digest(*said) + repr(told).encode()
