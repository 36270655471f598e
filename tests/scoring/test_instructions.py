"""Each instruction: texts that follow it, and texts that do not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from align.scoring.instructions import INSTRUCTIONS

CASES: dict[str, list[tuple[dict[str, Any], list[str], list[str]]]] = {
    # name: settings, texts that follow, texts that do not
    "keywords:existence": [
        ({"keywords": ["cat", "Dog"]}, ["The CAT and the dog.", "category, dogma"], ["The cat.", "dog", ""]),
        ({"keywords": ["c++"]}, ["I like C++."], ["I like cc."]),
    ],
    "keywords:frequency": [
        ({"keyword": "war", "frequency": 2, "relation": "at least"}, ["War and war", "warwar ward"], ["war", "peace"]),
        ({"keyword": "war", "frequency": 2, "relation": "less than"}, ["War", "peace"], ["war, war"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["can", "ride"]}, ["I could. A candle, a bride."], ["I CAN.", "a (ride)", "can"]),
    ],
    "keywords:letter_frequency": [
        ({"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["Queue, quick"], ["quick", "none"]),
        ({"letter": "!", "let_frequency": 2, "let_relation": "less than"}, ["Hi!", "Hi"], ["Hi!!"]),
    ],
    "language:response_language": [
        ({"language": "de"}, ["Das ist nicht gut, und ich weiß es."], ["This is not good, and I know it."]),
        ({"language": "hi"}, ["यह अच्छा नहीं है।"], ["It is not good.", "", "12"]),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, ["a\n***\nb", "***\na\n\nc\n***\nb\n***"], ["a", "a\n\nb", "a***b***c", "a***\n***b"]),
        ({"num_paragraphs": 1}, ["a", "a\n\nb"], ["a***b", "***"]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, "relation": "at least"}, ["one two three", "one, two - three four"], ["one two", "- -"]),
        ({"num_words": 3, "relation": "less than"}, ["one two", ""], ["one two three"]),
    ],
    "length_constraints:number_sentences": [
        ({"num_sentences": 2, "relation": "at least"}, ["One. Two.", "One? Two"], ["One.", "Mr. One"]),
        ({"num_sentences": 2, "relation": "less than"}, ["One.", "one"], ["One. Two."]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"},
            ["a\n\nElm trees", "a b\n\n\n\n'elm, and more", "\n\na\n\nELM's\nb"],
            ["a\n\nelms", "elm\n\na", "a\n\nthe elm", "a\n\nelm\n\nb", "elm", "", "a\n\n..."],
        ),
        ({"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"}, [], ["a", "a\n\na"]),
    ],
    "detectable_content:postscript": [
        (
            {"postscript_marker": "P.S."},
            ["Bye.\nP.S. Hi", "Bye. p. s. hi", "P.S."],
            ["Bye. PS hi", "Bye. ps. hi", "xP.S."],
        ),
        ({"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S Hi", "P. P. S. hi"], ["Bye. P.S. Hi", ""]),
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[name], [street 3]", "[a][b][c]"], ["[name]", "[a\nb] [c]", "name]["]),
    ],
    "detectable_format:number_bullet_lists": [
        (
            {"num_bullets": 2},
            ["* a\n* b", "- a\ntext\n  - b", "Things:\n* a\n- b", "-a\n-b"],
            ["* a", "* a\n* b\n* c", "*a* is\n* b", "- a\n---\ntext", "**a**\n* b", "a - b\n* c"],
        ),
    ],
    "detectable_format:title": [
        ({}, ["<<Joy>>\nO joy", "A <<title of it>> here"], ["Joy", "<<>>", "<< >>", "<<a\nb>>", "<Joy>"]),
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", " My answer is maybe.\n"], ["Yes.", "My answer is yes", "My answer is perhaps."]),
    ],
    "detectable_format:number_highlighted_sections": [
        (
            {"num_highlights": 2},
            ["*a* and *b c*", "**a**\n*b*", "***a*** **b**", "* x *a*\n* y *b*"],
            ["*a*", "* a\n* b\n* c", "** ** * *", "a*b", "*a\nb* c*d\n", "2 * 3 * 4 * 5"],
        ),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "SECTION", "num_sections": 2},
            ["SECTION 1\na\nSECTION 2\nb", "SECTION1 a SECTION 22 b"],
            ["SECTION 1", "Section 1 Section 2", "SECTION A SECTION B", "SUBSECTION 1 SUBSECTION 2"],
        ),
    ],
    "detectable_format:json_format": [
        (
            {},
            ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[]\n```", ' ```JSON {"a": null}``` '],
            ["{a: 1}", 'Here: {"a": 1}', '```json\n{"a": 1}', "", "[" * 100_000, "9" * 10_000 + "x"],
        ),
    ],
    "combination:two_responses": [
        (
            {},
            ["a\n******\nb", "******a******b"],
            ["a", "a******a", "a******", "a***b", "a******b******c", "a************b"],
        ),
    ],
    "combination:repeat_prompt": [
        (
            {"prompt_to_repeat": "Write a poem.\n"},
            ["Write a poem.\n\nO!", " WRITE a poem. O!"],
            ["O! Write a poem.", ""],
        ),
    ],
    "startend:end_checker": [
        (
            {"end_phrase": "Is that all?"},
            ["Yes. Is that all?", '"So is that ALL?"\n'],
            ["Is that all? Yes.", "that all?"],
        ),
    ],
    "startend:quotation": [({}, ['"Yes."', ' "a "b" c"\n'], ["Yes.", '"Yes."!', '"', "'Yes.'", ""])],
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 2, "capital_relation": "at least"}, ["I AM", "NASA and ESA"], ["I am", "Nasa Esa"]),
        ({"capital_frequency": 2, "capital_relation": "less than"}, ["I am", "none"], ["I AM", "A B C"]),
    ],
    "change_case:english_capital": [
        ({}, ["I AM HERE, AND IT IS 5.", "YES"], ["I am here.", "DAS IST NICHT GUT UND ICH WEISS ES.", "5", "ЭТО ДОМ"]),
    ],
    "change_case:english_lowercase": [
        ({}, ["i am here, and it is 5.", "yes"], ["I am here.", "das ist nicht gut und ich weiß es.", "5", "это дом"]),
    ],
    "punctuation:no_comma": [({}, ["No comma. None; none."], ["One, two", ","])],
}


def test_every_instruction_has_cases() -> None:
    assert CASES.keys() == INSTRUCTIONS.keys()
    assert len(INSTRUCTIONS) == 25


@pytest.mark.parametrize(
    ("name", "settings", "text", "follows"),
    [
        pytest.param(name, settings, text, follows, id=f"{name}-{follows}-{i}")
        for name, cases in CASES.items()
        for settings, followed, broken in cases
        for follows, texts in ((True, followed), (False, broken))
        for i, text in enumerate(texts)
    ],
)
def test_follows(name: str, settings: dict[str, Any], text: str, follows: bool) -> None:
    assert INSTRUCTIONS[name](text, **settings) is follows


@pytest.mark.parametrize("name", CASES)
def test_no_text_takes_long(name: str) -> None:
    settings = CASES[name][0][0]
    hostile = [
        "*" * 50_000,
        "[" * 50_000,
        "<<" * 50_000,
        "\n" * 50_000,
        "*a" * 50_000,
        "- " * 50_000,
        " " * 50_000 + "x",
    ]
    began = time.perf_counter()
    for text in hostile:
        INSTRUCTIONS[name](text, **settings)
    assert time.perf_counter() - began < 5.0
