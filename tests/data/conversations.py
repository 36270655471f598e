"""Conversations for property tests: any text that is no control token, with the borders where merges happen."""

from __future__ import annotations

from hypothesis import strategies as st

from align.data.records import Conversation, Message

SNIPPETS = [
    "a",
    " ",
    "\n",
    "\n\n",
    "  ",
    "er",
    "low",
    " the",
    "1",
    "23",
    ":",
    "'s",
    "\t",
    "바다",
    "银",
    "é",
    "e\u0301",
    "😊",
    "[/INST]",
]

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="<>\0\ufeff")

texts = (
    st.lists(st.sampled_from(SNIPPETS) | st.text(CHARACTERS, max_size=6), min_size=1, max_size=8)
    .map("".join)
    .filter(str.strip)
)
"""Not blank, valid unicode, and without the angle brackets that control tokens are written with."""


def conversation(*turns: str, system: str | None = None) -> list[Message]:
    """Turns of user and assistant in alternation."""
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    return messages


def record(*turns: str, system: str | None = None) -> Conversation:
    return Conversation(0, conversation(*turns, system=system))
