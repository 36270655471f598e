"""Writers of film reviews: always well-formed English, good in proportion to their care."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Final, TypeVar

from align.quickstart.lexicon import (
    BLAME,
    BLAME_VERBS,
    FEATURES,
    PRAISE,
    PRAISE_VERBS,
    TITLES,
    TONES,
)
from align.quickstart.prompts import MAX_FEATURES, TEMPLATES, Task, render

T = TypeVar("T")

OPENINGS: Final = (
    "{title} is a {opinion} film.",
    "I found {title} {adverb} {opinion}.",
    "{title} was {adverb} {opinion}.",
)
NEUTRAL_OPENINGS: Final = ("I watched {title} last night.", "I saw {title} with a friend.")
ON_ONE: Final = ("The {first} is {opinion}.", "Its {first} felt {adverb} {opinion}.", "I {verb} the {first}.")
ON_TWO: Final = ("The {first} and the {second} are {opinion}.", "I {verb} the {first} and the {second}.")
WITHOUT_OPINION: Final = ("I noticed the {first}.", "The {first} was as expected.")
FILLERS: Final = (
    "It runs for two hours.",
    "The cinema was almost empty.",
    "It opened in a small town.",
    "My friend left at noon.",
)
CLOSINGS: Final = {
    1: ("I recommend it to everyone.", "I would never avoid it."),
    -1: ("I do not recommend it.", "You should avoid it."),
}
ADVERBS: Final = ("so", "truly", "rather", "simply")


def chance(rng: Random, probability: float) -> bool:
    """True with the given probability."""
    return rng.random() < probability


def pick(rng: Random, items: Sequence[T]) -> T:
    """A uniform choice by `random()` alone, the one draw that Python promises to keep the same."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """A random order, by `random()` alone."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda keyed: keyed[0])]


def inserted(rng: Random, items: Sequence[T], more: Iterable[T]) -> list[T]:
    """`items` in their order, with each of `more` at a random place among them."""
    result = list(items)
    for item in more:
        result.insert(pick(rng, range(len(result) + 1)), item)
    return result


def draw_task(rng: Random) -> tuple[Task, str]:
    """A random task and the prompt that asks for it."""
    count = pick(rng, range(1, MAX_FEATURES + 1))
    features = tuple(shuffled(rng, FEATURES)[:count])
    task = Task(title=pick(rng, TITLES), tone=pick(rng, tuple(TONES)), features=features)
    return task, render(task, pick(rng, TEMPLATES))


def write_review(rng: Random, task: Task, care: float) -> str:
    """A review of `task`'s film.

    Args:
        rng: The source of all choices.
        task: What was asked.
        care: 0 (heeds little of the task, pads, contradicts itself) to 1 (does what was asked).
    """
    return _Writer(rng, task, care).write()


class _Writer:
    def __init__(self, rng: Random, task: Task, care: float) -> None:
        self.rng = rng
        self.sloppy = 1.0 - care
        wanted = TONES[task.tone]
        self.tone = -wanted if chance(rng, 0.4 * self.sloppy) else wanted
        self.title = pick(rng, TITLES) if chance(rng, 0.1 * self.sloppy) else task.title
        asked = [feature for feature in task.features if chance(rng, 1.0 - 0.25 * self.sloppy)]
        others = [feature for feature in FEATURES if feature not in task.features]
        strays = [pick(rng, others) for _ in range(2) if chance(rng, 0.4 * self.sloppy)]
        self.features = inserted(rng, asked, dict.fromkeys(strays))
        self.unused = {
            sign: {"opinion": shuffled(rng, words), "verb": shuffled(rng, verbs)}
            for sign, words, verbs in ((1, PRAISE, PRAISE_VERBS), (-1, BLAME, BLAME_VERBS))
        }

    def write(self) -> str:
        fillers = [pick(self.rng, FILLERS) for _ in range(3) if chance(self.rng, 0.7 * self.sloppy)]
        sentences = [self._opening(), *inserted(self.rng, self._on_features(), fillers)]
        if chance(self.rng, 1.0 - 0.8 * self.sloppy):
            sentences.append(pick(self.rng, CLOSINGS[self._sign()]))
        return " ".join(sentences)

    def _opening(self) -> str:
        templates = NEUTRAL_OPENINGS if chance(self.rng, 0.8 * self.sloppy) else OPENINGS
        return self._fill(pick(self.rng, templates))

    def _on_features(self) -> list[str]:
        sentences = []
        rest = list(self.features)
        while rest:
            first = rest.pop(0)
            if rest and chance(self.rng, 0.3):
                sentences.append(self._fill(pick(self.rng, ON_TWO), first=first, second=rest.pop(0)))
            else:
                templates = WITHOUT_OPINION if chance(self.rng, 0.6 * self.sloppy) else ON_ONE
                sentences.append(self._fill(pick(self.rng, templates), first=first))
        return sentences

    def _sign(self) -> int:
        return -self.tone if chance(self.rng, 0.2 * self.sloppy) else self.tone

    def _fill(self, template: str, first: str = "", second: str = "") -> str:
        unused = self.unused[self._sign()]
        slots = {"title": self.title, "first": first, "second": second, "adverb": pick(self.rng, ADVERBS)}
        for slot in ("opinion", "verb"):
            if f"{{{slot}}}" in template:
                slots[slot] = self._word(unused[slot])
        return template.format(**slots)

    def _word(self, words: list[str]) -> str:
        """The next unused word, or, in a sloppy review, one that may have been used already."""
        if chance(self.rng, self.sloppy):
            return pick(self.rng, words)
        words.append(words.pop(0))
        return words[-1]
