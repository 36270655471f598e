"""Chat templates on their own: what they may not depend on."""

from __future__ import annotations

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from align.data.chat import ChatEncoder
from align.data.records import Conversation
from align.data.template import TODAY
from tests.data.conversations import conversation
from tests.data.tokenizers import CHATML, CHATML_MARKS_WITH_END, IM, byte_level

# As Llama 3.1 and 3.2 write it.
DATED = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}"
    "{{ '<|im_start|>system\nToday is ' + date_string + '<|im_end|>\n' }}"
)
# Inside a macro, with a format that is no literal.
DATED_INSIDE = (
    "{% macro today(format) %}{{ strftime_now(format) }}{% endmacro %}"
    "{{ '<|im_start|>system\nToday is ' + today('%Y-%m-%d %H:%M') + '<|im_end|>\n' }}"
)
FIRST, SECOND = datetime(2025, 12, 31, 23, 59), datetime(2026, 1, 1)


@pytest.mark.parametrize("rest", [CHATML, CHATML_MARKS_WITH_END], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("dated", "today"), [(DATED, "26 Jul 2024"), (DATED_INSIDE, "2024-07-26 00:00")], ids=["llama", "macro"]
)
def test_a_template_that_asks_for_the_date_gives_the_same_on_every_day(
    monkeypatch: pytest.MonkeyPatch, dated: str, today: str, rest: str
) -> None:
    tokenizer = byte_level(CHATML, IM, eos="<|im_end|>")
    messages = conversation("What day is it?", "A fine one.")
    found, undated = [], []
    for now in (FIRST, SECOND):

        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return now  # noqa: B023

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        tokenizer.chat_template = dated + rest
        example = ChatEncoder(tokenizer, 4096).encode(Conversation(0, messages))
        prompt = ChatEncoder(tokenizer, 4096).prompt(messages[:1])
        found.append((example.prompt_ids, example.completions[0].ids, prompt))
        # Another text, so that transformers does not take the template that was compiled for align.
        tokenizer.chat_template = dated + rest + "{# of one's own #}"
        undated.append(tokenizer.apply_chat_template(messages, tokenize=False))
    assert undated[0] != undated[1], "the clock of transformers has moved elsewhere: this test shows nothing"
    assert found[0] == found[1]
    assert f"Today is {today}" in tokenizer.decode(found[0][0])
    assert found[0][0] == found[0][2]


def test_the_day_is_the_one_that_templates_name_themselves() -> None:
    assert TODAY.strftime("%d %b %Y") == "26 Jul 2024"
