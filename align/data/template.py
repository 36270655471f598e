"""A chat template as `chat.py` uses it: conversations become text, cut where the assistant begins and ends.

A template that asks for today's date (`strftime_now`, as Llama 3's do) is told `TODAY`, always the same day: the tokens
of a prompt must not change at midnight, or caches and checkpoints would no longer fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from align.data.records import BadRow, Message
from align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SPECIAL = 64
"""Characters at the end of a text among which its last special token is looked for."""

TODAY = datetime(2024, 7, 26)
"""What a template gets for today. Llama 3's own templates name this day where they cannot ask."""

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template puts before the text that the assistant generates."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation.

    Attributes:
        text: The part.
        trained: Whether its tokens are trained.
        after: The special token or else the character right before it, which decides how its beginning is tokenised.
        rewritten: Whether it is an assistant's turn in words that are not the data's; such a turn is not trained.
    """

    text: str
    trained: bool = False
    after: str = ""
    rewritten: bool = False


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, in the sandbox of transformers.

    Args:
        tokenizer: With a chat template.
        special: Matches any of its special tokens.

    Raises:
        DataError: There is no template, or it cannot render a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so a conversation cannot be told from plain text",
                where="model.base",
                fix="use the instruction-tuned variant, put a chat_template.jinja beside the tokenizer, "
                "or train on `format: text`",
            )
        self._template = tokenizer.get_chat_template()
        self._variables = tokenizer.special_tokens_map
        self._special = special
        self._special_end = re.compile(rf"(?:{special.pattern})\Z")
        self._eos = str(tokenizer.eos_token)
        self._marks = MARK.search(self._template) is not None
        question, answer = Message(role="user", content="question"), Message(role="assistant", content="answer")
        try:
            tail = self._render([question, answer]).rpartition("answer")[2]
        except BadRow as error:
            raise DataError(
                f"{error.reason} (a user's and an assistant's turn)", where="model.base", fix="mend chat_template.jinja"
            ) from None
        self._stop = self._stop_of(tail)
        rest = tail[len(self._stop) :]
        self._space = rest if rest.isspace() else ""

    def prompt(self, messages: Sequence[Message]) -> Piece:
        """A prompt with the generation prompt.

        Raises:
            BadRow: The template refuses the conversation.
        """
        return Piece(self._render(messages, generation_prompt=True))

    def continuation(self, start: str, prompt: Sequence[Message], turns: Sequence[Message]) -> tuple[Piece, ...]:
        """What follows the rendered prompt, up to the end of the last turn; the EOS of that turn is left off.

        Args:
            start: The rendered prompt.
            prompt: Messages up to a user's.
            turns: What follows, from an assistant's turn to an assistant's turn.

        Raises:
            BadRow: The template refuses the conversation, or writes its beginning in another way than `prompt` alone.
        """
        messages = [*prompt, *turns]
        full, marks = self._render_marked(messages)
        if full.startswith(start):
            spans = self._marked_spans(full, marks, len(start), len(turns)) or self._spans(
                full, start, messages, len(prompt)
            )
        elif len(turns) == 1:
            # The template writes a finished turn in another way than one to be generated (reasoning models: it leaves
            # out what the generation prompt opens). What counts is what the model will see and has to say.
            full = start + turns[0]["content"] + self._stop
            spans = [(len(start), len(full))]
        else:
            raise BadRow("the chat template rewrites earlier turns, so the conversation does not begin with its prompt")
        return self._pieces(full, len(start), spans, turns)

    def _context(self, text: str) -> str:
        """What decides how text right after `text` is tokenised: its last special token, or its last character."""
        found = self._special_end.search(text, max(0, len(text) - LONGEST_SPECIAL))
        return found[0] if found else text[-1:]

    def _pieces(
        self, full: str, cursor: int, spans: Sequence[tuple[int, int]], turns: Sequence[Message]
    ) -> tuple[Piece, ...]:
        pieces = []
        for number, (begin, end) in enumerate(spans):
            text = full[begin:end]
            # A turn whose words the template takes out or changes (the thoughts of earlier turns) says something the
            # data does not say: it stays as context and is not trained.
            kept = text.removesuffix(self._stop).rstrip().endswith(turns[2 * number]["content"].strip())
            if number == len(spans) - 1:
                text = text.removesuffix(self._eos)
            if begin > cursor:
                pieces.append(Piece(full[cursor:begin], after=self._context(full[:cursor])))
            pieces.append(Piece(text, kept, self._context(full[:begin]), not kept))
            cursor = end
        return tuple(pieces)

    def _spans(self, full: str, start: str, messages: Sequence[Message], first: int) -> list[tuple[int, int]]:
        """Begin and end of every assistant's turn from message `first` on, by rendering turn after turn."""
        spans: list[tuple[int, int]] = []
        for i in range(first, len(messages), 2):
            if i > first:
                start = self._render(messages[:i], generation_prompt=True)
            upto = full if i == len(messages) - 1 else self._render(messages[: i + 1])
            if not full.startswith(start) or not (full.startswith(upto) or self._stop):
                raise BadRow("the chat template rewrites earlier turns, so their ends cannot be found")
            region = full[len(start) : len(upto) if full.startswith(upto) else None]
            stop = region.find(self._stop) if self._stop else -1
            length = len(region.removesuffix(self._space)) if stop < 0 else stop + len(self._stop)
            if spans and spans[-1][1] > len(start):
                raise BadRow("the chat template ends earlier turns in another way than the last one")
            spans.append((len(start), len(start) + length))
        return spans

    def _marked_spans(
        self, full: str, marks: Sequence[tuple[int, int]], first: int, turns: int
    ) -> list[tuple[int, int]]:
        """The same from the template's marks; nothing if they do not say where each turn is."""
        spans = []
        for begin, end in marks:
            if end <= first:
                continue
            begin = max(begin, first)
            stop = full.find(self._stop, begin, end + len(self._stop)) if self._stop else -1
            end = begin + len(full[begin:end].removesuffix(self._space)) if stop < 0 else stop + len(self._stop)
            spans.append((begin, end))
        return spans if len(spans) == (turns + 1) // 2 else []

    def _stop_of(self, tail: str) -> str:
        """What ends a turn: everything up to EOS, or else up to the first special token after the content."""
        if self._eos in tail:
            return tail[: tail.index(self._eos) + len(self._eos)]
        found = self._special.search(tail)
        return tail[: found.end()] if found else ""

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        return self._call(messages, add_generation_prompt=generation_prompt)[0]

    def _render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        return self._call(messages, return_assistant_tokens_mask=self._marks)

    def _call(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        # Late, for it takes seconds: what only reads records needs no transformers.
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        try:
            # The compiled template is kept by its text, so this is the one that is rendered next. As a variable, a
            # function would reach it as text.
            _compile_jinja_template(self._template).globals["strftime_now"] = TODAY.strftime
            texts, marks = render_jinja_template(
                [list(messages)], chat_template=self._template, **self._variables, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from None
        return texts[0], marks[0] if marks else []
