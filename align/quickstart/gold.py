"""The gold reward of the film-review world: what a review is truly worth, by a fixed formula.

    gold = form * length * (0.5 * coverage + 0.3 * tone + 0.2 * title)          in [0, 1]

All is read from the two texts. A review is cut into sentences at ``.``, ``!`` and ``?``; words are compared in lower
case.

- *Opinion words* are praise (+1) or blame (-1); one of the three words after ``not``, ``never`` or ``hardly`` counts
  the other way round. Only the first use of an opinion word in a review counts. The *stance* of a sentence is the sign
  of the sum over its opinion words, times the wanted tone: +1 agrees, -1 contradicts, 0 says nothing or both.
- **coverage**: mean over the asked features of the best sentence that mentions it (``the`` or ``its`` before the
  feature): 1 where that sentence's stance is +1, 0.5 where it is 0, else 0; less 0.25 for each feature mentioned but
  not asked for; never below 0.
- **tone**: mean stance of all sentences, never below 0.
- **title**: 1 if the asked film and no other is named, else 0.
- **length**: 1 from 16 to 32 words; below, words / 16; above, falling linearly to 0 at 48.
- **form**: share of well-formed sentences. One is well formed if it begins with a capital, ends with a mark, has 3 to
  14 words, has a verb, says no content word twice, and does not repeat an earlier sentence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

from align.quickstart.lexicon import DETERMINERS, FEATURES, FUNCTION_WORDS, NEGATORS, POLARITY, TONES, VERBS
from align.quickstart.prompts import Task, parse, titles_in, words_of

SHORTEST, LONGEST, SLOPE = 16, 32, 16
NEGATION_REACH: Final = 3
STRAY_COST: Final = 0.25
SENTENCE_WORDS: Final = range(3, 15)

_SENTENCE = re.compile(r"[^.!?]+[.!?]?")


@dataclass(frozen=True)
class Quality:
    """The five parts of the gold reward, each in [0, 1]."""

    coverage: float
    tone: float
    title: float
    length: float
    form: float

    @property
    def gold(self) -> float:
        return self.form * self.length * (0.5 * self.coverage + 0.3 * self.tone + 0.2 * self.title)


class GoldReward:
    """Scores a completion by the formula at the top of this module."""

    version: ClassVar[int] = 1
    label: ClassVar[str] = "gold"
    """Its column in results."""
    minimum: ClassVar[float] = 0.0
    maximum: ClassVar[float] = 1.0

    def score(self, prompt: str, completion: str) -> float:
        """The gold reward of `completion`, in [0, 1].

        Raises:
            DataError: The prompt does not ask for a film review of this world.
        """
        return judge(parse(prompt), completion).gold


def judge(task: Task, review: str) -> Quality:
    """Measures a review against what was asked."""
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(review) if words_of(sentence)]
    if not sentences:
        return Quality(coverage=0.0, tone=0.0, title=0.0, length=0.0, form=0.0)
    spoken = [words_of(sentence) for sentence in sentences]
    stances = [stance * TONES[task.tone] for stance in _stances(spoken)]
    return Quality(
        coverage=_coverage(task, spoken, stances),
        tone=max(0.0, sum(stances) / len(stances)),
        title=float(titles_in(review) == {task.title.lower()}),
        length=_length(sum(map(len, spoken))),
        form=_form(sentences, spoken),
    )


def _stances(spoken: list[list[str]]) -> list[int]:
    """Sign of each sentence's opinion words, every word counted at its first use only."""
    seen: set[str] = set()
    stances = []
    for words in spoken:
        balance = 0
        for position, word in enumerate(words):
            if word in POLARITY and word not in seen:
                seen.add(word)
                negated = not NEGATORS.isdisjoint(words[max(0, position - NEGATION_REACH) : position])
                balance += -POLARITY[word] if negated else POLARITY[word]
        stances.append((balance > 0) - (balance < 0))
    return stances


def _coverage(task: Task, spoken: list[list[str]], stances: list[int]) -> float:
    credit: dict[str, float] = {}
    for words, stance in zip(spoken, stances, strict=True):
        for determiner, word in pairwise(words):
            if determiner in DETERMINERS and word in FEATURES:
                credit[word] = max(credit.get(word, 0.0), (stance + 1) / 2)
    asked = sum(credit.pop(feature, 0.0) for feature in task.features) / len(task.features)
    return max(0.0, asked - STRAY_COST * len(credit))


def _length(words: int) -> float:
    if words < SHORTEST:
        return words / SHORTEST
    return max(0.0, 1.0 - max(0, words - LONGEST) / SLOPE)


def _form(sentences: list[str], spoken: list[list[str]]) -> float:
    well_formed = 0
    earlier: set[tuple[str, ...]] = set()
    for sentence, words in zip(sentences, spoken, strict=True):
        content = [word for word in words if word not in FUNCTION_WORDS]
        well_formed += (
            sentence[0].isupper()
            and sentence[-1] in ".!?"
            and len(words) in SENTENCE_WORDS
            and not VERBS.isdisjoint(words)
            and len(set(content)) == len(content)
            and tuple(words) not in earlier
        )
        earlier.add(tuple(words))
    return well_formed / len(sentences)
