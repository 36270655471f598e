"""The twenty-five verifiable instructions of IFEval: name -> whether a text follows it.

*Source*: arXiv:2311.07911, table 1; the names and settings are those of its data. Where the published checkers and the
description of an instruction differ, the description holds:

- a bullet is ``* `` or ``-`` at the beginning of a line, so that neither ``*emphasis*`` nor a rule of dashes is one;
- a highlighted section begins and ends without a blank, so that two bullets in a line are none;
- paragraphs are counted without empty ones, wherever those stand;
- the language is told by `align.scoring.language`, sentences and capital words by `align.scoring.units`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final, Literal

from align.scoring.language import speaks
from align.scoring.units import capital_words, count_sentences, count_words

Check = Callable[..., bool]
Relation = Literal["at least", "less than"]

INSTRUCTIONS: Final[dict[str, Check]] = {}
"""Name -> check, called with the text and the instruction's settings by name."""

_RESPONSES: Final = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_HIGHLIGHT: Final = re.compile(r"(\*{1,3})(?=[^\s*])[^\n*]*+(?<=\S)\1")
_BULLET: Final = re.compile(r"^[ \t]*(?:\*[ \t]+|-(?!-)[ \t]*)\S", re.MULTILINE)
_PLACEHOLDER: Final = re.compile(r"\[[^\[\]\n]*\]")
_TITLE: Final = re.compile(r"<<([^<>\n]+)>>")
_FENCED: Final = re.compile(r"```(?:json)?(.*)```", re.DOTALL | re.IGNORECASE)
_FIRST_WORD: Final = re.compile(r"[\"'“‘]*([^\s.,?!\"'”’]+)")


def instruction(name: str) -> Callable[[Check], Check]:
    """Registers a check under the name that the data uses."""

    def register(check: Check) -> Check:
        INSTRUCTIONS[name] = check
        return check

    return register


@instruction("keywords:existence")
def has_keywords(text: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, also within a word; case does not matter."""
    return all(keyword.lower() in text.lower() for keyword in keywords)


@instruction("keywords:frequency")
def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    """A keyword occurs so often, also within words."""
    return _holds(text.lower().count(keyword.lower()), relation, frequency)


@instruction("keywords:forbidden_words")
def has_no_forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a whole word."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


@instruction("keywords:letter_frequency")
def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    """A letter, or another sign, occurs so often, large or small."""
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


@instruction("language:response_language")
def is_in_language(text: str, *, language: str) -> bool:
    """The whole text is in one language."""
    return speaks(text, language)


@instruction("length_constraints:number_paragraphs")
def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """So many paragraphs, divided by ``***``."""
    return len(_divided(text, "***") or []) == num_paragraphs


@instruction("length_constraints:number_words")
def number_words(text: str, *, num_words: int, relation: Relation) -> bool:
    """So many words."""
    return _holds(count_words(text), relation, num_words)


@instruction("length_constraints:number_sentences")
def number_sentences(text: str, *, num_sentences: int, relation: Relation) -> bool:
    """So many sentences."""
    return _holds(count_sentences(text), relation, num_sentences)


@instruction("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs, divided by empty lines, and one of them begins with a word."""
    paragraphs = [each.strip() for each in text.split("\n\n") if each.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = _FIRST_WORD.match(paragraphs[nth_paragraph - 1])
    return first is not None and first[1].lower() == first_word.lower()


@instruction("detectable_content:postscript")
def has_postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript with this marker; a blank after its points and the case do not matter."""
    marker = re.escape(postscript_marker).replace(r"\.", r"\.\s?")
    return re.search(rf"(?<!\w){marker}", text, re.IGNORECASE) is not None


@instruction("detectable_content:number_placeholders")
def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders, as ``[address]``."""
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


@instruction("detectable_format:number_bullet_lists")
def number_bullets(text: str, *, num_bullets: int) -> bool:
    """Exactly so many bullets."""
    return len(_BULLET.findall(text)) == num_bullets


@instruction("detectable_format:title")
def has_title(text: str) -> bool:
    """A title, as ``<<poem of joy>>``."""
    return any(title.strip() for title in _TITLE.findall(text))


@instruction("detectable_format:constrained_response")
def is_constrained(text: str) -> bool:
    """One of the three answers that may be given."""
    return any(response in text for response in _RESPONSES)


@instruction("detectable_format:number_highlighted_sections")
def number_highlights(text: str, *, num_highlights: int) -> bool:
    """At least so many sections between asterisks, as ``*this*`` or ``**this**``."""
    return len(_HIGHLIGHT.findall(text)) >= num_highlights


@instruction("detectable_format:multiple_sections")
def number_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections that begin with a word and a number, as ``SECTION 1``."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter)}\s?\d", text)) >= num_sections


@instruction("detectable_format:json_format")
def is_json(text: str) -> bool:
    """The whole text is JSON, in a code fence or not."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):  # the latter of a text of brackets only
        return False
    return True


@instruction("combination:two_responses")
def is_two_responses(text: str) -> bool:
    """Two different responses, divided by ``******``."""
    responses = _divided(text, "******") or []
    return len(responses) == 2 and responses[0] != responses[1]


@instruction("combination:repeat_prompt")
def repeats_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The text begins with the request, word for word."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def ends_with(text: str, *, end_phrase: str) -> bool:
    """The text ends with a phrase; case and closing quotation marks do not matter."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def is_quoted(text: str) -> bool:
    """The whole text stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@instruction("change_case:capital_word_frequency")
def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    """So many words in capital letters."""
    return _holds(len(capital_words(text)), capital_relation, capital_frequency)


@instruction("change_case:english_capital")
def is_english_capitals(text: str) -> bool:
    """English, in capital letters only."""
    return text.isupper() and speaks(text, "en")


@instruction("change_case:english_lowercase")
def is_english_lowercase(text: str) -> bool:
    """English, in small letters only."""
    return text.islower() and speaks(text, "en")


@instruction("punctuation:no_comma")
def has_no_comma(text: str) -> bool:
    """No comma."""
    return "," not in text


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


def _divided(text: str, divider: str) -> list[str] | None:
    """The parts between dividers; None if one is empty. The text may begin and end with a divider."""
    parts = [part.strip() for part in text.split(divider)]
    parts = parts[not parts[0] :]
    parts = parts[: len(parts) - (bool(parts) and not parts[-1])]
    return parts if all(parts) else None
